"""Selection of neurons on a GPU: exactness against a stable sort first, then device time.

    python3 -m bench.bench_selection check   ties, zeros, NaN, infinities, every size of row, one and many rows
    python3 -m bench.bench_selection table   router scores [B F] to sorted neurons, the kernel beside XLA's top-k

With the variable OUT set, JSON lines go into that folder.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report, timing
from bench.workloads import MODELS
from pallas_kernels.selection import select_top_k

COLUMNS = ("case", "kernel", "time_us", "spread_us", "bytes")
CASES = tuple((m, b, d) for m in ("opt-6.7b", "opt-66b") for b in (1, 64, 256) for d in (0.1, 0.3))


def rows() -> Iterator[tuple[str, np.ndarray, int]]:
    """(name, scores [B n], k) that a careless selection gets wrong."""
    rng = np.random.default_rng(0)
    for n, k in ((257, 1), (1000, 1000), (5000, 640), (36864, 11136)):
        yield f"random {n} {k}", rng.standard_normal((3, n)), k
        yield f"ties {n} {k}", np.round(rng.standard_normal((3, n))), k
    yield "all equal", np.zeros((2, 4096)), 777
    yield "mostly zeros", np.where(rng.random((4, 36864)) < 0.02, rng.standard_normal((4, 36864)), -1.0), 3712
    odd = rng.standard_normal((4, 2048))
    odd[:, ::7], odd[:, 3::50], odd[:, 5::60], odd[:, 11::13] = -0.0, np.inf, -np.inf, 0.0
    yield "infinities", odd, 500
    odd[1:, ::31] = np.nan
    yield "NaN", odd, 1990


def run_checks() -> bool:
    """Prints one line a failure; whether all are right."""
    right = True
    for name, scores, k in rows():
        for shared in (True, False):
            given = np.asarray(scores[:1] if shared else scores, np.float32)
            call = functools.partial(select_top_k, k=k, shared=shared, implementation="mosaic")
            found = np.asarray(jax.jit(call)(given))
            want = _sorted(np.maximum(given[0], 0) if shared else given, k)
            if not np.array_equal(found, want):
                right = False
                print(f"FAIL {name} shared={shared}: {int((found != want).sum())} differ", flush=True)
    print("selection is exact" if right else "selection is wrong", flush=True)
    return right


def _sorted(scores: np.ndarray, k: int) -> np.ndarray:
    """By the host's stable sort."""
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=-1, kind="stable")
    return np.sort(order[..., :k], axis=-1)


def measure(scores: list[jax.Array], call: Callable[..., jax.Array]) -> dict[str, Any]:
    run = jax.jit(lambda sets: [call(one) for one in sets])
    seconds, spread = timing.seconds_per_call(lambda: run(scores), len(scores), min_seconds=0.005)
    return {"time_us": seconds * 1e6, "spread_us": spread * 1e6}


def table() -> list[dict[str, Any]]:
    """The named shapes; scores are float32 and, as behind a router, still in the L2 where they fit."""
    found = []
    for name, batch, density in CASES:
        model = MODELS[name]
        keys = jax.random.split(jax.random.key(0), 8)
        scores = [jax.random.normal(key, (batch, model.d_ff), jnp.float32) for key in keys]
        k = -(-int(density * model.d_ff) // 128) * 128
        for implementation in ("mosaic", "xla"):
            call = functools.partial(select_top_k, k=k, shared=True, implementation=implementation)
            row = {
                "case": f"{name} B{batch} d{density:g}",
                "kernel": implementation,
                "bytes": scores[0].nbytes,
            }
            found.append(row | measure(scores, call))
        found.append({**row, "kernel": "pooling only"} | measure(scores, _pool))
    return found


def _pool(scores: jax.Array) -> jax.Array:
    return jnp.sum(jnp.maximum(scores, 0.0), axis=0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "table"))
    args = parser.parse_args()
    if "check" in args.verbs and not run_checks():
        print("wrong results: no speed is reported", file=sys.stderr)
        return 1
    if "table" in args.verbs:
        found = table()
        print(report.table(found, COLUMNS))
        if path := report.results_path("selection.jsonl"):
            report.append_jsonl(path, found, report.provenance())
    return 0


if __name__ == "__main__":
    sys.exit(main())
