"""A model directory: written, read and checked."""
