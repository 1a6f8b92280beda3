"""Tokens from a model: sampling, the token loop, whole generations and streams."""
