"""Oracle of the selection: a stable sort of every row, without thresholds or ranks."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reference(scores: Float[Array, "B n"], k: int, *, shared: bool) -> Int[Array, "*B k"]:
    """The k largest entries, ties to the lower index, indices ascending; NaN counts as the smallest value."""
    scores = scores.astype(jnp.float32)
    if shared:
        scores = jnp.sum(jnp.where(scores <= 0, 0.0, scores), axis=0)
    order = jnp.argsort(-jnp.where(jnp.isnan(scores), -jnp.inf, scores), axis=-1, stable=True)
    return jnp.sort(order[..., :k], axis=-1).astype(jnp.int32)
