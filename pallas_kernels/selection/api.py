"""From scores to the sorted indices of the k largest: neurons of a batch, groups of each sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import dispatch
from pallas_kernels.selection import mosaic, xla

OP = "select_top_k"


def select_top_k(
    scores: Float[Array, "B n"], k: int, *, shared: bool, implementation: str | None = None
) -> Int[Array, "*B k"]:
    """Indices of the k largest scores, ascending, int32; among equal scores the lower index wins.

    shared=True: one index [k] for the batch, by the sum over B of max(score, 0) in float32.
    shared=False: [B k], the k largest of every row. NaN counts as the smallest value.

    `implementation`: "mosaic" (Pallas, Hopper GPUs), "xla" (anywhere), or None for the best one available.

    Raises ValueError for shapes, dtypes or a k that don't fit, NotImplementedError when the named
    implementation can't do the call.
    """
    _validate(scores, k)
    backends = {
        "mosaic": lambda device: mosaic.select_top_k(scores, k, shared=shared, device=device),
        "xla": lambda device: xla.select_top_k(scores, k, shared=shared),
    }
    return dispatch(OP, implementation, backends, scores)


def _validate(scores: jax.Array, k: int) -> None:
    if scores.ndim != 2 or scores.shape[0] < 1:
        _fail("scores must be [B n] with B > 0", list(scores.shape), "2 axes")
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        _fail("scores must be floating", scores.dtype, "a floating dtype")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= scores.shape[1]:
        _fail("k must be a Python int from 1 to n", k, f"1..{scores.shape[1]}")


def _fail(what: str, got: object, expected: object) -> None:
    raise ValueError(f"{OP}: {what}; got {got}, expected {expected}")
