"""Writes, reads and checks model directories."""
