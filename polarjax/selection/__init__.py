"""The parts of sparsity that decoding needs: plans, routers and the selection itself."""
