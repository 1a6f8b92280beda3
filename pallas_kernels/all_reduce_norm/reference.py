"""Oracle of the end of half a layer: the sum of all devices' parts, in float32, in one place."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.all_reduce_norm.problem import Kind


def reference(
    updates: Float[Array, "N B D"],
    x: Float[Array, "B D"],
    scale: Float[Array, "D"],
    *,
    bias: Float[Array, "D"] | None = None,
    shift: Float[Array, "D"] | None = None,
    kind: Kind,
    eps: float,
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """y and norm(y) * scale + shift of `pallas_kernels.all_reduce_norm`, for the updates of all N devices."""
    wide = lambda vector: 0.0 if vector is None else vector.astype(jnp.float32)[None]
    total = wide(bias) + jnp.sum(updates.astype(jnp.float32), 0)
    stream = (x.astype(jnp.float32) + total).astype(x.dtype)
    y = stream.astype(jnp.float32)
    if kind == "layer":
        y = y - jnp.mean(y, -1, keepdims=True)
    y = y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return stream, (y * wide(scale) + wide(shift)).astype(x.dtype)
