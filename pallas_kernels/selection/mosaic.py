"""Selection on Hopper (Pallas Mosaic GPU): the k-th largest key by bisection of its bits, then compaction.

One thread block holds a row of keys in registers. Each round counts the keys that reach a candidate; a round more
a bit, fewer when a candidate is reached by exactly k. Chosen entries find their place by a prefix sum over votes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import _device
from pallas_kernels.selection import compact
from pallas_kernels.selection.tiles import MAX_ROW, MIN_ROW, WARPGROUPS, padded
from pallas_kernels.selection.xla import pooled

LOWEST = jnp.iinfo(jnp.int32).min  # of all keys; no score has it


# Jitted, so that the layers of a model share one trace, one lowering and one binary.
@functools.partial(jax.jit, static_argnames=("k", "shared", "device", "interpret"))
def select_top_k(
    scores: Float[Array, "B n"], k: int, *, shared: bool, device: _device.Device, interpret: bool = False
) -> Int[Array, "*B k"]:
    """As `pallas_kernels.select_top_k`, for rows of 257 to 40,960 entries.

    interpret: find the threshold in Pallas's GPU interpreter on the CPU; the compaction is then plain JAX.

    Raises NotImplementedError for shorter and longer rows.
    """
    if not interpret:
        _device.require_hopper(device)
    n = scores.shape[1]
    if not MIN_ROW <= n <= MAX_ROW:
        raise NotImplementedError(f"needs rows of {MIN_ROW} to {MAX_ROW} entries; got {n}")
    rows = pooled(scores)[None, :] if shared else scores.astype(jnp.float32)
    keys = jnp.pad(keys_of(rows), ((0, 0), (0, padded(n) - n)), constant_values=LOWEST)
    chosen = _interpreted(keys, k) if interpret else _kernel(keys, k, False)
    return chosen[0] if shared else chosen


def keys_of(rows: Float[Array, "B n"]) -> Int[Array, "B n"]:
    """int32 in the order of the scores: equal for -0 and +0, below every number for NaN."""
    rows = jnp.where(jnp.isnan(rows), -jnp.inf, jnp.where(rows == 0, 0.0, rows))
    bits = lax.bitcast_convert_type(rows, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _kernel(keys: jax.Array, k: int, interpret: bool) -> jax.Array:
    """[B k] chosen entries; interpreted, [B 128] with (threshold, how many equal to it are chosen) in front."""
    batch, length = keys.shape
    share = length // WARPGROUPS
    layout = plgpu.Layout.WG_STRIDED((share,), vec_size=1)

    def body(keys_ref, out_ref, counts, places, barrier):
        row, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
        mine = plgpu.load(keys_ref.at[row, pl.ds(warpgroup * share, share)], layout=layout)
        if interpret:
            threshold, extra = _threshold(_portable_count(mine, warpgroup, counts, barrier), k)

            @pl.when(warpgroup == 0)
            def _():
                out_ref[row, 0], out_ref[row, 1] = threshold, extra
        else:
            threshold, extra = _threshold(compact.counter(share, mine, counts), k)
            compact.write(share, k)(mine, threshold, extra, places, out_ref.at[row])

    out = jax.ShapeDtypeStruct((batch, 128 if interpret else k), jnp.int32)
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(batch,),
        grid_names=("row",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((2, 32), jnp.int32),
            plgpu.SMEM((length // 32,), jnp.int32),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="select_top_k",
    )(keys)


def _threshold(count: Callable[[jax.Array, jax.Array], jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
    """(t, extra): k keys are above t, or equal to t and among the first `extra` of these."""
    lowest = jnp.int32(LOWEST)

    def unsettled(state):
        bit, _, exact = state
        return (bit >= 0) & (exact == 0)

    def settle(state):
        bit, prefix, _ = state
        candidate = prefix | lax.shift_left(jnp.int32(1), bit)
        reached = count(candidate ^ lowest, bit & 1)
        return bit - 1, lax.select(reached >= k, candidate, prefix), (reached == k).astype(jnp.int32)

    start = (jnp.int32(31), jnp.int32(0), jnp.int32(0))
    bit, prefix, exact = lax.while_loop(unsettled, settle, start)
    threshold = (prefix ^ lowest) - exact
    return threshold, k - count(threshold + 1, bit & 1)


def _portable_count(keys, warpgroup, counts, barrier) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """As `compact.counter`, without inline code."""

    def count(candidate, parity):
        counts[parity, warpgroup] = jnp.sum((keys >= candidate).astype(jnp.int32))
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        total = counts[parity, 0]
        for other in range(1, WARPGROUPS):
            total = total + counts[parity, other]
        return total

    return count


def _interpreted(keys: jax.Array, k: int) -> jax.Array:
    found = _kernel(keys, k, True)
    threshold, extra = found[:, :1], found[:, 1:2]
    equal = keys == threshold
    chosen = (keys > threshold) | (equal & (jnp.cumsum(equal, axis=1) <= extra))
    return jax.vmap(lambda row: jnp.nonzero(row, size=k, fill_value=-1)[0])(chosen).astype(jnp.int32)
