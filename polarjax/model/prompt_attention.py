"""Attention among the tokens of prompts: cuDNN's fused kernel on NVIDIA GPUs, plain operations elsewhere."""

from functools import partial

import jax
import jax.numpy as jnp

from polarjax.types import Array, Float, Int

_LARGEST_HEAD = 128
_FIRST_CAPABILITY = 8.0  # Ampere


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B"],
    *,
    window: int | None,
) -> Float[Array, "B T K G H"]:
    """Causal attention among the tokens of a right-padded batch; rows past `lengths` are undefined."""
    B, T, K, G, H = q.shape
    plain = partial(_attention, window=window)
    by_platform = {}
    if q.dtype == jnp.float16:  # XLA has no float16 products with float32 sums on CPUs
        wide = lambda a: a.astype(jnp.float32)
        by_platform["cpu"] = lambda q, k, v, n: plain(wide(q), wide(k), wide(v), n).astype(q.dtype)
    if _is_fused(q):
        by_platform["cuda"] = partial(plain, implementation="cudnn")
        plain = jax.checkpoint(
            plain
        )  # gradients of either branch keep what both keep: not the weights [B N T T]
    arguments = (q.reshape(B, T, K * G, H), k, v, lengths)
    if not by_platform:
        return plain(*arguments).reshape(q.shape)
    return jax.lax.platform_dependent(*arguments, default=plain, **by_platform).reshape(q.shape)


def _attention(q, k, v, lengths, *, window: int | None, implementation=None) -> Float[Array, "B T N H"]:
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes dtypes
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=implementation,
        )


def _is_fused(q: Float[Array, "B T K G H"]) -> bool:
    """Whether cuDNN's kernel is there and takes these queries; JAX has no gradients of it for odd T."""
    T, H = q.shape[1], q.shape[-1]
    if q.dtype not in (jnp.float16, jnp.bfloat16) or T % 2 or H > _LARGEST_HEAD or H % 8:
        return False
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    return "cuda" in jax.devices()[0].client.platform_version and float(capability) >= _FIRST_CAPABILITY
