"""What decoding needs of sparsity: plans, routers and the selection itself."""
