"""Selection in plain JAX: ranks for short rows, top-k for long ones. Runs on every device."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

RANKING_LIMIT = 256  # the longest row for which n² comparisons beat a sort


def pooled(scores: Float[Array, "B n"]) -> Float[Array, " n"]:
    """One score per entry for the whole batch: the sum of the positive parts, in float32; NaN stays NaN."""
    scores = scores.astype(jnp.float32)
    return jnp.sum(jnp.where(scores <= 0, 0.0, scores), axis=0)  # XLA's maximum loses NaN on CPUs


def select_top_k(scores: Float[Array, "B n"], k: int, *, shared: bool) -> Int[Array, "*B k"]:
    """See `pallas_kernels.select_top_k`."""
    rows = pooled(scores)[None, :] if shared else scores.astype(jnp.float32)
    rows = jnp.where(
        jnp.isnan(rows), -jnp.inf, jnp.where(rows == 0, 0.0, rows)
    )  # sorts distinguish -0 from 0
    chosen = _by_rank(rows, k) if rows.shape[1] <= RANKING_LIMIT else _by_sort(rows, k)
    return chosen[0] if shared else chosen


def _by_rank(rows: Float[Array, "B n"], k: int) -> Int[Array, "B k"]:
    entry = jnp.arange(rows.shape[1], dtype=jnp.int32)
    mine, other = rows[:, :, None], rows[:, None, :]
    earlier = (entry[None, :] < entry[:, None])[None]
    rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=2)  # [B n]
    chosen = rank < k
    place = jnp.sum(chosen[:, None, :] & earlier, axis=2)  # chosen entries before this one
    slot = jnp.arange(k, dtype=place.dtype)
    here = chosen[:, None, :] & (place[:, None, :] == slot[None, :, None])  # [B k n]
    return jnp.sum(jnp.where(here, entry[None, None, :], 0), axis=2)


def _by_sort(rows: jax.Array, k: int) -> jax.Array:
    return jnp.sort(lax.top_k(rows, k)[1], axis=-1).astype(jnp.int32)
