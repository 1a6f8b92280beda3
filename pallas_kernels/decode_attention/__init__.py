from pallas_kernels.decode_attention.api import sparse_decode_attention

__all__ = ["sparse_decode_attention"]
