"""Selection on Hopper (Pallas Mosaic GPU): the k-th largest key by counting into bins, then compaction.

One thread block holds a row of keys in registers, as distances from the largest. A pass counts them into 2,048 bins
(256 for short rows) over the undecided range, at first from the largest to the smallest key, and the next pass divides
the bin of the k-th: two passes for distinct scores, four at most. Prefix sums give the chosen entries their places.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import _device
from pallas_kernels.selection import block, portable, tiles
from pallas_kernels.selection.xla import pooled


# Jitted so that all layers of a model share one trace, one lowering and one binary.
@functools.partial(jax.jit, static_argnames=("k", "shared", "device", "interpret"))
def select_top_k(
    scores: Float[Array, "B n"], k: int, *, shared: bool, device: _device.Device, interpret: bool = False
) -> Int[Array, "*B k"]:
    """See `pallas_kernels.select_top_k`; rows of up to 36,864 entries.

    interpret: find the k-th key in Pallas's GPU interpreter on the CPU, and do the rest in plain JAX.

    Raises NotImplementedError for longer rows.
    """
    if not interpret:
        _device.require_hopper(device)
    _device.require_static_shapes(scores)
    batch, n = scores.shape
    if n > tiles.MAX_ROW:
        raise NotImplementedError(f"needs rows of up to {tiles.MAX_ROW} entries; got {n}")
    scores = scores.astype(jnp.float32)
    pool = shared and batch <= tiles.POOL_LIMIT and not interpret
    if shared and not pool:
        scores = pooled(scores)[None]
    rows = scores[None] if pool else scores[:, None]
    find = _interpreted if interpret else functools.partial(_kernel, pool=pool, signed=not shared)
    chosen = find(rows, k)
    return chosen[0] if shared else chosen


def _kernel(rows: Float[Array, "R M n"], k: int, *, pool: bool, signed: bool) -> Int[Array, "R k"]:
    padding = ((0, 0), (0, 0), (0, -rows.shape[2] % 4))
    rows = jnp.pad(rows, padding, constant_values=jnp.nan)  # NaN is chosen last
    count, members, n = rows.shape

    def body(rows_ref, out_ref, bins, slots):
        row = lax.axis_index("row")
        distances, shift = block.load(members, n, pool=pool, signed=signed)(rows_ref, row, bins, slots)
        crossing = functools.partial(block.crossing(n), distances)
        cut, extra = _kth(lambda *state: crossing(*state, bins, slots), shift, k, tiles.digit(n))
        block.write(n, k)(distances, cut, extra, slots, out_ref, row)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, k), jnp.int32),
        grid=(count,),
        grid_names=("row",),
        num_threads=tiles.warpgroups(n),
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((2 ** tiles.digit(n),), jnp.int32), plgpu.SMEM((4, 32), jnp.int32)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name="select_top_k",
    )(rows)


def _kth(crossing: Callable, shift: jax.Array, k: int, digit: int) -> tuple[jax.Array, jax.Array]:
    """(cut, extra): the k smallest distances are those below `cut` and the first `extra` of those equal to it."""

    def undecided(state):
        return state[-1] == 0

    def narrow(state):
        low, shift, left, _, _ = state
        found, left, full = crossing(low, shift, left)
        low = low + lax.shift_left(found, shift)
        cut = low + lax.shift_left(jnp.int32(1), shift) - 1
        done = full | (shift == 0).astype(jnp.int32)
        return low, jnp.maximum(shift - digit, 0), left, cut, done

    start = (jnp.int32(0), shift, jnp.int32(k), jnp.int32(0), jnp.int32(0))
    _, _, extra, cut, _ = lax.while_loop(undecided, narrow, start)
    return cut, extra


def _interpreted(rows: Float[Array, "R 1 n"], k: int) -> Int[Array, "R k"]:
    distances = portable.distances(rows[:, 0])
    cut, extra = portable.kth(distances, functools.partial(_kth, k=k, digit=tiles.digit(rows.shape[-1])))
    return portable.compact(distances, cut, extra, k)
