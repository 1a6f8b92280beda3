"""The one decoder: its layers, cache and parameters."""
