"""Selective decode kernels for JAX: each operation in plain XLA and in Pallas for Hopper GPUs."""

from pallas_kernels._dispatch import Choice, record_backends
from pallas_kernels.decode_attention import sparse_decode_attention
from pallas_kernels.selection import select_top_k
from pallas_kernels.sparse_mlp import sparse_mlp

__all__ = ["Choice", "record_backends", "select_top_k", "sparse_decode_attention", "sparse_mlp"]
