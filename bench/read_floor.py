"""The shortest time in which a kernel can read its bytes: it streams them into shared memory and does nothing else.

    OUT=. python -m bench.read_floor

This shows a kernel's fixed costs (launch, latency of the first bytes, the last blocks) without attention or products.
Calls are chained and their memory rotated as in the other benches. `pct_peak` is relative to the bandwidth of a large
copy, so it shows the percentage that any single launch can reach with the same number of bytes.
"""

import argparse
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench import report, timing
from pallas_kernels import _device

MEGABYTES = (8, 16, 24, 31, 35, 47, 63, 78, 94, 126, 134, 157, 189, 252, 315, 411, 629, 1258)
ROWS, COLUMNS = 64, 256  # one chunk, in bfloat16: 32 KiB
COLUMNS_SHOWN = ("MB", "stages", "time_us", "spread_us", "gbps", "pct_peak")


@functools.partial(jax.jit, static_argnames=("stages", "blocks"))
def read(x: jax.Array, data: jax.Array, *, stages: int, blocks: int) -> jax.Array:
    """Returns x [blocks, 128] after `blocks` thread blocks have read `data` [n ROWS, COLUMNS], taking chunks in turn."""
    chunks = data.shape[0] // ROWS

    def body(x_g, data_g, out_g, ring, own, full, own_full):
        block = lax.axis_index("block")
        mine = (chunks - block + blocks - 1) // blocks

        def fetch(i):
            rows = pl.ds((block + i * blocks) * ROWS, ROWS)
            slot = lax.rem(i, jnp.int32(stages))
            plgpu.copy_gmem_to_smem(data_g.at[rows, :], ring.at[slot], full.at[slot])

        for i in range(stages):
            pl.when(i < mine)(functools.partial(fetch, jnp.int32(i)))
        plgpu.copy_gmem_to_smem(x_g.at[pl.ds(block, 1), :], own, own_full)

        def step(i, _):
            plgpu.barrier_wait(full.at[lax.rem(i, jnp.int32(stages))])
            pl.when(i + stages < mine)(lambda: fetch(i + stages))

        lax.fori_loop(0, mine, step, None)
        plgpu.barrier_wait(own_full)
        plgpu.copy_smem_to_gmem(own, out_g.at[pl.ds(block, 1), :])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types={
            "ring": plgpu.SMEM((stages, ROWS, COLUMNS), data.dtype),
            "own": plgpu.SMEM((1, x.shape[1]), x.dtype),
            "full": plgpu.Barrier(num_barriers=stages),
            "own_full": plgpu.Barrier(),
        },
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="read_floor",
    )(x, data)


def measure(megabytes: int, stages: int, peak: float, blocks: int) -> dict[str, Any]:
    """A row of the table; its time is that of one of the chained calls."""
    chunks = round(megabytes * 1e6 / (ROWS * COLUMNS * 2))
    data = jax.ShapeDtypeStruct((chunks * ROWS, COLUMNS), jnp.bfloat16)
    size = data.size * data.dtype.itemsize
    count = timing.sets_needed(size)
    calls = max(count, timing.calls_needed(size / peak))
    x = jnp.zeros((blocks, 128), jnp.float32)
    make = jax.jit(lambda key: jax.random.normal(key, data.shape, data.dtype))
    sets = [(make(key),) for key in jax.random.split(jax.random.key(0), count)]
    program = timing.chained(functools.partial(read, stages=stages, blocks=blocks), calls)
    taken = timing.time_call(lambda: program(x, sets), calls)
    row = {"MB": megabytes, "bytes": size, "stages": stages}
    return row | timing.speed(size, taken, peak)


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    timing.require_gpu()
    peak, blocks = timing.copy_bandwidth(), _device.current().num_sms
    head = report.provenance(copy_gbps=peak / 1e9)
    rows = []
    for megabytes in MEGABYTES:
        tried = [measure(megabytes, stages, peak, blocks) for stages in (3, 6)]
        rows.append(min(tried, key=lambda row: row["time_us"]))
        if path := report.results_path("read_floor.jsonl"):
            report.append_jsonl(path, rows[-1:], head)
        print(report.table(rows[-1:], COLUMNS_SHOWN), flush=True)
    print(head)
    return 0


if __name__ == "__main__":
    sys.exit(main())
