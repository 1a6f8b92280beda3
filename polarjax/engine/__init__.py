"""Requests in, tokens out: slots that share a cache, and the loop that keeps them full."""
