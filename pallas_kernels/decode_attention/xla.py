"""Decode attention in plain JAX: gathers the selected groups, attends, scatters into zeros. Runs on every device."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def sparse_decode_attention(
    q: Float[Array, "B K G H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int[Array, " B"],
    group_index: Int[Array, "B k"] | None,
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B K G H"]:
    """See `pallas_kernels.sparse_decode_attention`; float32 softmax and accumulation."""
    if group_index is None:
        return _attend(q, k, v, lengths, scale, window)
    groups = q.shape[1]
    present = (group_index >= 0) & (group_index < groups)
    row = jnp.arange(q.shape[0])[:, None]
    column = jnp.where(present, group_index, 0)
    picked = _attend(q[row, column], k[row, column], v[row, column], lengths, scale, window)
    column = jnp.where(present, group_index, groups)  # out of range: dropped
    return jnp.zeros_like(q).at[row, column].set(picked, mode="drop")


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, scale: float, window: int | None
) -> jax.Array:
    position = lax.broadcasted_iota(lengths.dtype, (1, k.shape[2]), 1)
    end = jnp.minimum(lengths, k.shape[2])[:, None]
    seen = position < end
    if window is not None:
        seen &= position >= end - window
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = (
        jnp.einsum("bkgh,bksh->bkgs", q, k, preferred_element_type=jnp.float32, precision=precision) * scale
    )
    low = jnp.finfo(jnp.float32).min
    scores = jnp.where(seen[:, None, None, :], scores, low)
    weights = jnp.where(seen[:, None, None, :], jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    total = weights.sum(-1, keepdims=True)
    v = jnp.where(seen[:, None, :, None], v, 0)  # 0 * NaN is NaN
    out = jnp.einsum(
        "bkgs,bksh->bkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32, precision=precision
    )
    return (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
