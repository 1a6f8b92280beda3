"""`block` without inline code, for Pallas's GPU interpreter: the passes over bins in a kernel, the rest in JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.selection import tiles


def distances(rows: Float[Array, "R n"]) -> Int[Array, "R n"]:
    """Distances of the keys from their row's largest, unsigned in int32; -0 equals +0, and NaN equals -inf."""
    rows = jnp.where(jnp.isnan(rows), -jnp.inf, jnp.where(rows == 0, 0.0, rows))
    bits = lax.bitcast_convert_type(rows, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    return jnp.max(keys, axis=1, keepdims=True) - keys


def kth(distances: Int[Array, "R n"], search: Callable) -> tuple[Int[Array, "R 1"], Int[Array, "R 1"]]:
    """Runs `search(crossing, shift)` for every row, one thread block each."""
    count, n = distances.shape
    widest = lax.bitcast_convert_type(distances, jnp.uint32).max(axis=1)
    shifts = jnp.maximum(32 - tiles.digit(n) - lax.clz(widest).astype(jnp.int32), 0)
    padding = ((0, 0), (0, tiles.padded(n) - n))
    padded = jnp.pad(distances, padding, constant_values=-1)
    workers, bins = tiles.warpgroups(n), 2 ** tiles.digit(n)
    share = tiles.padded(n) // workers

    def body(distances_ref, shifts_ref, out_ref, counts, barrier):
        row, worker = lax.axis_index("row"), lax.axis_index("warpgroup")
        mine = distances_ref[row, pl.ds(worker * share, share)]

        def crossing(low, shift, left):
            place = lax.shift_right_logical(mine - low, jnp.full_like(mine, shift))
            hit = (place >= 0) & (place < bins)
            counts[worker] = jnp.zeros((bins,), jnp.int32).at[jnp.where(hit, place, bins)].add(1, mode="drop")
            _sync(barrier)
            up_to = jnp.cumsum(sum(counts[i] for i in range(workers)))
            _sync(barrier)
            found = jnp.sum((up_to < left).astype(jnp.int32))
            before = jnp.max(jnp.where(up_to < left, up_to, 0))
            reached = jnp.min(jnp.where(up_to >= left, up_to, jnp.int32(2**31 - 1)))
            return found, left - before, (reached == left).astype(jnp.int32)

        cut, extra = search(crossing, shifts_ref[row])

        @pl.when(worker == 0)
        def _():
            out_ref[row, 0], out_ref[row, 1] = cut, extra

    found = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, 128), jnp.int32),
        grid=(count,),
        grid_names=("row",),
        num_threads=workers,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((workers, bins), jnp.int32), plgpu.Barrier(num_arrivals=workers)],
        interpret=plgpu.InterpretGPUParams(detect_races=True),
        kernel_name="select_top_k",
    )(padded, shifts)
    return found[:, :1], found[:, 1:2]


def _sync(barrier) -> None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def compact(distances: jax.Array, cut: jax.Array, extra: jax.Array, k: int) -> Int[Array, "R k"]:
    """The entries of each row below `cut` and the first `extra` of those equal to it, ascending, k in all."""
    far, near = (lax.bitcast_convert_type(x, jnp.uint32) for x in (cut, distances))
    equal = near == far
    chosen = (near < far) | (equal & (jnp.cumsum(equal, axis=1) <= extra))
    return jax.vmap(lambda row: jnp.nonzero(row, size=k, fill_value=-1)[0])(chosen).astype(jnp.int32)
