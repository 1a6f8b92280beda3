"""Picks the k largest scores, as sorted indices: neurons for a batch, or groups for each sequence."""

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

    -0 equals +0; NaN counts as -inf. All implementations give the same indices if their sums over B are equal; these
    are float32, added in an unspecified order.

    Args:
      scores: any floating dtype; compared in float32.
      k: a Python int from 1 to n.
      shared: True for one index [k] for the batch, ranked by the sum over B of max(score, 0), which is NaN if a score
        is; False for [B k], the k largest of every row.
      implementation: "mosaic" (Pallas, Hopper GPUs; rows of up to 36,864 entries), "xla" (anywhere), or None for
        the best one that can do the call; `record_backends` shows which one ran.

    Raises:
      ValueError: a shape, a dtype or k is invalid.
      NotImplementedError: the named implementation can't do the call.
    """
    scores = jnp.asarray(scores)
    _validate(scores, k, shared)

    def hopper(device: Device) -> Array:
        require_hopper(device)
        from pallas_kernels.selection import mosaic  # takes half a second; CPUs don't need it

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
