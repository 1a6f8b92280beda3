"""Selection of neurons on a GPU: checks results against a stable sort first, then measures device time.

    python3 -m bench.bench_selection check   ties, zeros, NaN, infinities, every size of row, one and many rows
    python3 -m bench.bench_selection table   router scores [B F] to sorted neurons, compared with XLA's top-k
    python3 -m bench.bench_selection small   scores [B K] of groups to the sorted groups of each sequence

A table stops after --seconds, with important rows first, and prints the rows it has. A row whose selection is wrong has
no time. If the variable OUT is set, JSON lines are written to that folder.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report, timing
from bench.workloads import BATCHES, DENSITIES, MODELS
from pallas_kernels.selection import select_top_k

COLUMNS = (
    "case",
    "kernel",
    "launches",
    "time_us",
    "spread_us",
    "wall_us",
    "bytes",
    "gbps",
    "pct_peak",
    "error",
)
SELECTIVE = ("opt-6.7b", "opt-66b", "opt-30b")  # the named models with neuron selection
FIRST = tuple((m, b, d) for m in SELECTIVE[:2] for b in (1, 64, 256) for d in (0.1, 0.3))
EVERY = itertools.product(SELECTIVE, BATCHES, (density for density in DENSITIES if density < 1))
OTHERS = tuple(case for case in EVERY if case not in FIRST)
SMALL = tuple((n, b) for n in (8, 32, 72, 56) for b in (1, 16, 64, 8, 256))
LIMIT = 1e-5  # largest `error` allowed: sums of rows are rounded
CALLS = 8

type Row = dict[str, Any]


def rows() -> Iterator[tuple[str, np.ndarray, int]]:
    """(name, scores [B n], k) of cases that a careless selection gets wrong."""
    rng = np.random.default_rng(0)
    for n, k in ((1, 1), (7, 3), (72, 21), (512, 512), (513, 1), (1000, 1000), (5000, 640), (36864, 11136)):
        yield f"random {n} {k}", rng.standard_normal((3, n)), k
        yield f"ties {n} {k}", np.round(rng.standard_normal((3, n))), k
    for batch, n, k in ((1, 16384, 1664), (64, 16384, 1664), (64, 72, 21), (2, 5001, 5000)):
        yield f"batch of {batch}, {n} {k}", np.round(4 * rng.standard_normal((batch, n))) / 8, k
    yield "all equal", np.zeros((2, 4096)), 777
    yield "mostly zeros", np.where(rng.random((4, 36864)) < 0.02, rng.standard_normal((4, 36864)), -1.0), 3712
    odd = rng.standard_normal((4, 2048))
    odd[:, ::7], odd[:, 3::50], odd[:, 5::60], odd[:, 11::13] = -0.0, np.inf, -np.inf, 0.0
    yield "infinities", odd, 500
    odd[1:, ::31] = np.nan
    yield "NaN", odd, 1990


def run_checks() -> bool:
    """Prints one line per failure; True if all are right."""
    right = True
    for name, scores, k in rows():
        for shared in (True, False):
            given = np.asarray(np.round(scores * 8) if shared else scores, np.float32)  # sums are exact
            call = functools.partial(select_top_k, k=k, shared=shared, implementation="mosaic")
            found = np.asarray(jax.jit(call)(given))
            want = _sorted(np.maximum(given, 0).sum(0) if shared else given, k)
            if not np.array_equal(found, want):
                right = False
                print(f"FAIL {name} shared={shared}: {int((found != want).sum())} differ", flush=True)
    print("selection is exact" if right else "selection is wrong", flush=True)
    return right


def _sorted(scores: np.ndarray, k: int) -> np.ndarray:
    """The expected selection, by a stable sort on the host."""
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=-1, kind="stable")
    return np.sort(order[..., :k], axis=-1)


def error(found: np.ndarray, scores: np.ndarray, k: int) -> float:
    """By how much a rejected entry exceeds a selected one, relative to the top score; infinite for invalid indices."""
    worst = 0.0
    for index, row in zip(np.atleast_2d(found), np.atleast_2d(scores), strict=True):
        if index.shape != (k,) or (np.diff(index) <= 0).any() or index[0] < 0 or index[-1] >= row.size:
            return float("inf")
        left = np.delete(row, index)
        if left.size:
            worst = max(worst, float((left.max() - row[index].min()) / np.abs(row).max()))
    return worst


def measure(scores: list[jax.Array], call: Callable[..., jax.Array], peak: float) -> Row:
    run = jax.jit(lambda sets: [call(one) for one in sets])
    taken = timing.time_call(lambda: run(scores), len(scores))
    return timing.speed(scores[0].nbytes, taken, peak) | {"launches": round(taken.launches, 2)}


def table(peak: float) -> Iterator[Row]:
    """Rows for the named shapes; scores are float32 and, if they fit, in the L2 cache, as right after a router."""
    for cases, kernel in itertools.product((FIRST, OTHERS), ("mosaic", "pooling only", "xla")):
        for name, batch, density in cases:
            if kernel != "mosaic" and density != 0.3:
                continue  # pooling has no k, and XLA sorts everything
            model = MODELS[name]
            k = -(-int(density * model.d_ff) // 128) * 128
            yield _row(f"{name} B{batch} d{density:g}", kernel, (batch, model.d_ff), k, peak, shared=True)


def small(peak: float) -> Iterator[Row]:
    """Rows that select half of the groups of each sequence."""
    for kernel in ("mosaic", "xla"):
        for n, batch in SMALL:
            yield _row(f"K{n} B{batch}", kernel, (batch, n), n // 2, peak, shared=False)


def _row(case: str, kernel: str, shape: tuple[int, int], k: int, peak: float, *, shared: bool) -> Row:
    scores = [
        jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(0), CALLS)
    ]
    row: Row = {"case": case, "kernel": kernel, "bytes": scores[0].nbytes}
    if kernel == "pooling only":
        return row | measure(scores, _pool, peak)
    call = functools.partial(select_top_k, k=k, shared=shared, implementation=kernel)
    host = np.asarray(scores[0], np.float64)
    given = np.maximum(host, 0).sum(0) if shared else host
    row["error"] = error(np.asarray(jax.jit(call)(scores[0])), given, k)
    if not row["error"] <= LIMIT:
        return row | {"wrong": True}
    return row | measure(scores, call, peak)


def within(seconds: float, found: Iterator[Row]) -> list[Row]:
    """The rows that can be measured within the time limit."""
    started, rows = time.perf_counter(), []
    for row in found:
        rows.append(row)
        if time.perf_counter() - started > seconds:
            print(f"out of time after {len(rows)} rows", file=sys.stderr)
            break
    return rows


def _pool(scores: jax.Array) -> jax.Array:
    return jnp.sum(jnp.maximum(scores, 0.0), axis=0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "table", "small"))
    parser.add_argument("--seconds", type=float, default=36, help="time limit for each table")
    args = parser.parse_args()
    timing.require_gpu()
    if "check" in args.verbs and not run_checks():
        print("wrong results, so no speed is reported", file=sys.stderr)
        return 1
    if args.verbs == ["check"]:
        return 0
    peak, wrong = timing.copy_bandwidth(), False
    head = report.provenance(copy_gbps=peak / 1e9)
    for verb, make in (("table", table), ("small", small)):
        if verb in args.verbs:
            found = within(args.seconds, make(peak))
            print(report.table(found, COLUMNS))
            wrong |= any(row.get("wrong") for row in found)
            if path := report.results_path("selection.jsonl"):
                report.append_jsonl(path, found, head)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
