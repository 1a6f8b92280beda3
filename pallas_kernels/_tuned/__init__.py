"""The fastest tiles measured, as JSON files, and their lookup."""
