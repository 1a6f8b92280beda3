"""Attention of one new token per sequence over the selected KV groups of a cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._device import Device, require_hopper
from pallas_kernels._dispatch import dispatch
from pallas_kernels.decode_attention import xla
from pallas_kernels.decode_attention.tiles import OP


def sparse_decode_attention(
    q: Float[Array, "B K G H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int[Array, " B"],
    group_index: Int[Array, "B k"] | None,
    *,
    scale: float,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B K G H"]:
    """softmax(scale · q·kᵀ)·v over positions [max(0, length - window), length) of the selected groups' cache.

    The G query heads of a group share its keys and values. `group_index` names the groups to compute in each
    sequence, in any order; an entry outside [0, K), -1 by convention, is absent, a repeated one counts once, and
    None means every group. Groups that are not named, and sequences of length 0, give exact zeros; their cache, and
    positions outside the range, do not influence the result, whatever they hold. Lengths above S count as S, negative
    ones as 0.

    Args:
      q, k, v: queries of the new tokens, and the cache; all of one floating dtype, as is the result. Products accumulate
        in float32, and so does the softmax.
      lengths: filled positions of each sequence, including the new token's; any signed integer dtype.
      group_index: any signed integer dtype, or None.
      scale: a positive Python number, for instance H ** -0.5.
      window: how many of the last positions count; None for all.
      implementation: "mosaic" (Pallas, Hopper GPUs; bfloat16 and float16, no derivative), "xla" (anywhere), or
        None for the best one that can do the call; `record_backends` shows which one ran.

    Raises:
      ValueError: a shape, dtype or value is invalid.
      NotImplementedError: the named implementation can't do the call.
    """
    q, k, v, lengths = (jnp.asarray(x) for x in (q, k, v, lengths))
    group_index = None if group_index is None else jnp.asarray(group_index)
    _validate(q, k, v, lengths, group_index, scale, window)
    call = {"scale": float(scale), "window": window}
    lengths = lengths.astype(jnp.int32)  # a narrow dtype may not hold S
    group_index = None if group_index is None else group_index.astype(jnp.int32)
    operands = (q, k, v, lengths, group_index)

    def hopper(device: Device) -> Array:
        require_hopper(device)
        from pallas_kernels.decode_attention import mosaic  # takes half a second; CPUs don't need it

        return mosaic.sparse_decode_attention(*operands, device=device, **call)

    backends = {
        "mosaic": hopper,
        "xla": lambda _: xla.sparse_decode_attention(*operands, **call),
    }
    return dispatch(OP, implementation, backends, q, k)


def _validate(q, k, v, lengths, group_index, scale, window) -> None:
    if q.ndim != 4 or 0 in q.shape:
        _fail("q must be [B K G H]", q.shape, "4 axes, none empty")
    batch, groups, _, width = q.shape
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, groups, width):
        _fail("k must be [B K S H] like q", k.shape, (batch, groups, "S", width))
    if k.shape[2] == 0:
        _fail("the cache must not be empty", k.shape, "S > 0")
    if v.shape != k.shape:
        _fail("v must have k's shape", v.shape, k.shape)
    if not (q.dtype == k.dtype == v.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        _fail("q, k and v must share a floating dtype", f"{q.dtype}, {k.dtype}, {v.dtype}", "one dtype")
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.signedinteger):
        _fail("lengths must be signed integers [B]", f"{lengths.dtype}{list(lengths.shape)}", [batch])
    if group_index is not None:
        if group_index.ndim != 2 or group_index.shape[0] != batch or group_index.shape[1] < 1:
            _fail("group_index must be [B k] with k > 0", group_index.shape, (batch, "k"))
        if not jnp.issubdtype(group_index.dtype, jnp.signedinteger):
            _fail("group_index must be signed integers", group_index.dtype, "int32")
    if not isinstance(scale, int | float) or not scale > 0 or scale == float("inf"):
        _fail("scale must be a positive Python number", repr(scale), "for instance H ** -0.5")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        _fail("window must be a positive int or None", repr(window), "a number of positions")


def _fail(what: str, got: object, expected: object) -> None:
    raise ValueError(f"{OP}: {what}; got {got}, expected {expected}")
