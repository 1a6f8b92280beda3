"""Tiles that measured fastest, as JSON files, and their lookup."""
