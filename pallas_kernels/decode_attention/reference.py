"""Float32 oracle of decode attention: computes every group and position, then masks."""

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
    """See `pallas_kernels.sparse_decode_attention`; returns float32 for every input dtype."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    position = jnp.arange(k.shape[2])[None, :]
    end = jnp.minimum(lengths, k.shape[2])[:, None]
    seen = position < end
    if window is not None:
        seen &= position >= end - window
    scores = jnp.einsum("bkgh,bksh->bkgs", q * scale, k, precision=lax.Precision.HIGHEST)
    scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.maximum(scores.max(-1, keepdims=True), -1e30))
    total = weights.sum(-1, keepdims=True)
    weights /= jnp.where(total > 0, total, 1.0)
    out = jnp.einsum(
        "bkgs,bksh->bkgh", weights, jnp.where(seen[:, None, :, None], v, 0.0), precision=lax.Precision.HIGHEST
    )
    if group_index is None:
        return out
    group = jnp.arange(k.shape[1])[None, :, None]
    selected = (group_index[:, None, :] == group).any(-1)
    return jnp.where(selected[:, :, None, None], out, 0.0)
