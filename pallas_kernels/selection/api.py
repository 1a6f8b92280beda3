"""From scores to the sorted indices of the k largest: neurons of a batch, groups of each sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._device import Device, require_hopper
from pallas_kernels._dispatch import dispatch
from pallas_kernels.selection import xla

OP = "select_top_k"


def select_top_k(
    scores: Float[Array, "B n"], k: int, *, shared: bool, implementation: str | None = None
) -> Int[Array, "*B k"]:
    """Indices of the k largest scores, ascending, int32; among equal scores the lower index wins.

    -0 equals +0; NaN counts as -inf. The same call gives the same indices whichever implementation runs, as far
    as sums over B are the same: these are taken in float32, in no order that is promised.

    Args:
      scores: of any floating dtype; compared in float32.
      k: a Python int from 1 to n.
      shared: True for one index [k] for the batch, by the sum over B of max(score, 0), where a NaN makes the sum
        NaN; False for [B k], the k largest of every row.
      implementation: "mosaic" (Pallas, Hopper GPUs; rows of up to 36,864 entries), "xla" (anywhere), or None for
        the best one that can do the call; `record_backends` tells which that was.

    Raises:
      ValueError: shapes, dtypes or a k that don't fit.
      NotImplementedError: the named implementation can't do the call.
    """
    scores = jnp.asarray(scores)
    _validate(scores, k, shared)

    def hopper(device: Device) -> Array:
        require_hopper(device)
        from pallas_kernels.selection import mosaic  # half a second, which CPUs need not spend

        return mosaic.select_top_k(scores, k, shared=shared, device=device)

    backends = {
        "mosaic": hopper,
        "xla": lambda device: xla.select_top_k(scores, k, shared=shared),
    }
    return dispatch(OP, implementation, backends, scores)


def _validate(scores: jax.Array, k: int, shared: bool) -> None:
    if scores.ndim != 2 or 0 in scores.shape:
        _fail("scores must be [B n]", list(scores.shape), "2 axes, none empty")
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        _fail("scores must be floating", scores.dtype, "a floating dtype")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= scores.shape[1]:
        _fail("k must be a Python int from 1 to n", repr(k), f"1..{scores.shape[1]}")
    if not isinstance(shared, bool):
        _fail("shared must be a Python bool", repr(shared), "True or False")


def _fail(what: str, got: object, expected: object) -> None:
    raise ValueError(f"{OP}: {what}; got {got}, expected {expected}")
