"""Selective decode kernels for JAX: each operation in plain XLA and in Pallas for Hopper GPUs."""

from pallas_kernels._dispatch import Choice, record_backends
from pallas_kernels.decode_attention import sparse_decode_attention

__all__ = ["Choice", "record_backends", "sparse_decode_attention"]
