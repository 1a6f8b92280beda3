"""Attention of pieces of prompts to the cache that holds them and what came before them."""

import jax
import jax.numpy as jnp

from polarjax.types import Array, Float, Int

KEY_BLOCK = 512
"""Positions of the cache that are scored at a time, at most."""

SCORES_BYTES = 1 << 28
"""Most bytes of the scores of a block, unless 64 positions need more; a few arrays of that size are alive at a time."""

type Sums = tuple[Float[Array, "R K G T"], Float[Array, "R K G T"], Float[Array, "R K G T H"]]
"""The softmax over the positions seen so far: the largest score, the sum of the weights, the weighted values."""


def attend_to_cache(
    q: Float[Array, "R T K G H"],
    cache: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    rows: Int[Array, "R"],
    start: Int[Array, "R"],
    counts: Int[Array, "R"],
    *,
    window: int | None,
) -> Float[Array, "R T K G H"]:
    """Causal attention of R pieces to positions [0, start + count) of their rows of the cache.

    The cost grows with the longest row, not with S. Query t of a piece has position `start + t`; those past `counts` are
    undefined.
    """
    S, H = cache[0].shape[2:]
    block, end = min(S, _block_length(q.size // H)), start + counts
    position = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def product(formula, x, y):
        return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32, precision=precision)

    def add(i, sums: Sums) -> Sums:
        most, total, values = sums
        first = jnp.minimum(i * block, S - block)  # the last block may overlap the one before
        k, v = (_block(part, rows, first, block) for part in cache)
        key = first + jnp.arange(block, dtype=jnp.int32)
        filled = (key >= i * block)[None] & (key[None] < end[:, None])
        seen = filled[:, None] & (key[None, None] <= position[..., None])
        if window is not None:
            seen &= key[None, None] > position[..., None] - window
        seen = seen[:, None, None]
        scores = jnp.where(seen, product("rtkgh,rksh->rkgts", q, k) * H**-0.5, _LOW)
        larger = jnp.maximum(most, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - larger[..., None]), 0)
        kept = jnp.exp(most - larger)
        v = jnp.where(filled[:, None, :, None], v, 0)  # 0 * NaN is NaN
        added = product("rkgts,rksh->rkgth", weights.astype(v.dtype), v)
        return larger, total * kept + weights.sum(-1), values * kept[..., None] + added

    shape = (q.shape[0], *q.shape[2:4], q.shape[1])
    sums = jnp.full(shape, _LOW), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, H), jnp.float32)
    blocks = (jnp.max(end) + block - 1) // block
    _, total, values = jax.lax.fori_loop(jnp.int32(0), jnp.minimum(blocks, -(-S // block)), add, sums)
    heads = values / jnp.where(total > 0, total, 1)[..., None]
    return jnp.moveaxis(heads, 3, 1).astype(q.dtype)


def _block_length(queries: int) -> int:
    """Positions that are scored at a time, a power of two."""
    fitting = SCORES_BYTES // (4 * queries)
    return min(KEY_BLOCK, max(64, 1 << max(0, fitting.bit_length() - 1)))


_LOW = jnp.finfo(jnp.float32).min


def _block(cache: Float[Array, "B K S H"], rows, first, length: int) -> Float[Array, "R K s H"]:
    """Positions [first, first + length) of `rows`."""
    _, K, _, H = cache.shape
    zero = jnp.zeros_like(first)  # of its dtype: with x64, a Python 0 would be int64
    take = lambda row: jax.lax.dynamic_slice(cache, (row, zero, first, zero), (1, K, length, H))[0]
    return jax.vmap(take)(rows)
