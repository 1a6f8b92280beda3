"""The Mosaic GPU kernel of the selective MLP, for Hopper GPUs."""
