"""Sums over GPUs, with what surrounds them: checks results first, then measures time beside XLA's with NCCL.

    python3 -m bench.bench_all_reduce_norm check   both norms, biases, widths, summands, 2,000 sums in a row, repeated
    python3 -m bench.bench_all_reduce_norm table   time of one of many dependent sums, by the host's clock

Uses all GPUs of the host, up to 8. If the variable OUT is set, JSON lines are written to that folder.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import polarjax as pj
from bench import report, timing
from pallas_kernels import all_reduce_norm, connect
from pallas_kernels.all_reduce_norm.problem import Kind
from pallas_kernels.all_reduce_norm.reference import reference

COLUMNS = ("case", "devices", "kernel", "time_us", "spread_us", "bytes")
CHECKS: tuple[tuple[int, int, Kind, bool, bool], ...] = (
    *((16, 4096, "rms", False, False), (1, 4096, "layer", True, True), (64, 5120, "layer", True, True)),
    *((7, 7168, "rms", True, False), (120, 8192, "rms", False, False), (5, 9216, "layer", False, True)),
)
TIMED = ((1, 4096), (16, 4096), (48, 4096), (64, 4096), (128, 4096), (64, 8192))
SUMS, LOOPS, REPEATS = 16, 160, 5
SHARES = (0.5, 0.25, 0.125, 0.125)  # of a device's part, of its summands
EPS = 1e-5


def mesh_of_all() -> Mesh:
    """All GPUs, along the axis `model`."""
    return Mesh(np.array(jax.devices()[:8]), ("model",))


def chain(
    mesh: Mesh, kind: Kind, sums: int, loops: int, *, kernel: bool, summands: bool = False
) -> Callable[..., Any]:
    """Jitted (updates [N B D], x [B D], scale, bias, shift) -> stream and normed of each device, [N B D], after `loops`
    times as many dependent sums; each device's part of the next is its last one times its normed result."""

    def run(update, x, scale, bias, shift):
        part: Any = update[0]
        more: Any = {"bias": bias, "shift": shift, "kind": kind, "eps": EPS}

        def one(_, state):
            stream, normed = state
            link = connect(stream, mesh, "model", rows=x.shape[0], width=x.shape[1]) if kernel else None
            for i in range(sums):
                given = part * normed
                if link is not None:
                    if summands:
                        given = jnp.stack([share * given.astype(jnp.float32) for share in SHARES])
                    stream, normed = all_reduce_norm(given, stream, scale, link, i + 1, **more)
                else:
                    total = jax.lax.psum(given, "model")[None]
                    stream, normed = reference(total, stream, scale, **more)
                stream = stream * jnp.bfloat16(0.5)
            return stream, normed

        stream, normed = jax.lax.fori_loop(0, loops, one, (x, jnp.ones_like(x)))
        return stream[None], normed[None]

    each, all_ = PartitionSpec("model"), PartitionSpec()
    spread = jax.shard_map(
        run, mesh=mesh, in_specs=(each, all_, all_, all_, all_), out_specs=(each, each), check_vma=False
    )
    return jax.jit(spread, compiler_options=pj.OVERLAP)


def operands(mesh: Mesh, rows: int, width: int, *, biased: bool, shifted: bool) -> tuple[Any, ...]:
    """Random updates, stream, scale, bias and shift, where the mesh has them."""
    rng, devices = np.random.default_rng(rows), mesh.size
    at = lambda value, *spec: jax.device_put(
        np.asarray(value).astype(jnp.bfloat16), NamedSharding(mesh, PartitionSpec(*spec))
    )
    vector = lambda wanted: at(rng.normal(size=width)) if wanted else None
    update = at(rng.normal(size=(devices, rows, width)), "model")
    return update, at(rng.normal(size=(rows, width))), vector(True), vector(biased), vector(shifted)


def expected(update, x, scale, bias, shift, kind: Kind, sums: int) -> tuple[Any, Any]:
    """What `chain` computes in one loop, on one device."""
    normed = jnp.ones_like(x)
    for _ in range(sums):
        x, normed = reference(update * normed[None], x, scale, bias=bias, shift=shift, kind=kind, eps=EPS)
        x = x * jnp.bfloat16(0.5)
    return x, normed


def run_checks() -> bool:
    """Prints one line per case."""
    mesh, fine = mesh_of_all(), True
    for rows, width, kind, biased, shifted in CHECKS:
        given = operands(mesh, rows, width, biased=biased, shifted=shifted)
        for sums, summands in ((5, False), (2, True)):
            made = chain(mesh, kind, sums, 1, kernel=True, summands=summands)(*given)
            alone = [each if each is None else jnp.asarray(np.asarray(each)) for each in given]
            want = jax.jit(functools.partial(expected, kind=kind, sums=sums))(*alone)
            same = all(bool((np.asarray(each) == np.asarray(each)[:1]).all()) for each in made)
            error = max(
                _error(np.asarray(found)[0], np.asarray(right))
                for found, right in zip(made, want, strict=True)
            )
            fine &= same and error < 0.02 * sums
            print(f"{rows} x {width} {kind} {sums} sums: devices equal {same}, error {error:.1e}", flush=True)
    loop = chain(mesh, "rms", 40, 50, kernel=True)
    given = operands(mesh, 16, 4096, biased=False, shifted=False)
    runs = [np.asarray(jax.block_until_ready(loop(*given))[0], np.float32) for _ in range(3)]
    same = all(np.array_equal(runs[0], each) for each in runs) and np.isfinite(runs[0]).all()
    print(f"2,000 sums, three times: equal {same}", flush=True)
    return fine and bool(same)


def _error(found: np.ndarray, right: np.ndarray) -> float:
    found, right = found.astype(np.float32), right.astype(np.float32)
    return float(np.abs(found - right).max() / np.abs(right).max())


def table() -> Iterator[dict[str, Any]]:
    """One row per size, for the kernel and for XLA with NCCL."""
    mesh = mesh_of_all()
    for rows, width in TIMED:
        given = operands(mesh, rows, width, biased=False, shifted=False)
        for kernel in (True, False):
            loop, times = chain(mesh, "rms", SUMS, LOOPS, kernel=kernel), []
            for repeat in range(REPEATS + 1):
                started = time.perf_counter()
                jax.block_until_ready(loop(*given))
                times += [(time.perf_counter() - started) / (SUMS * LOOPS)] if repeat else []
            yield {
                "case": f"B{rows} D{width}",
                "devices": mesh.size,
                "kernel": "all_reduce_norm" if kernel else "psum and norm",
                "time_us": 1e6 * statistics.median(times),
                "spread_us": 1e6 * (max(times) - min(times)),
                "bytes": 2 * rows * width,
            }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "table"))
    args = parser.parse_args()
    timing.require_gpu()
    if len(jax.devices()) < 2:
        raise SystemExit("bench: needs two GPUs of one host")
    if not run_checks():
        print("wrong results, so no speed is reported", file=sys.stderr)
        return 1
    if "table" in args.verbs:
        report.measure(table(), report.provenance(), "all_reduce_norm.jsonl", COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
