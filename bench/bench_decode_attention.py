"""Decode attention on a GPU: checks results against the float32 oracle first, then measures device time.

    python3 -m bench.bench_decode_attention check            every head width, dtype, window, ragged lengths, -1
    python3 -m bench.bench_decode_attention sweep            tile configurations on a few workloads
    python3 -m bench.bench_decode_attention table            the named workloads, compared with XLA and cuDNN
    python3 -m bench.bench_decode_attention lengths          sequences of different lengths, compared with equal ones

`table --seconds 180` stops in time, with important workloads first; `--resume FILE` skips the rows in that file.
Several verbs run one after the other. If the variable OUT is set, JSON lines are written to that folder.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import attention_table, report, timing
from bench.attention_table import error
from bench.check_decode_attention import LIMIT, Operands, kernel_call, run_checks
from bench.workloads import MODELS, AttentionCase
from pallas_kernels import _device
from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.tiles import Problem, Tiles, heuristic, search_space

SWEEP = ("128x2s1", "64x2s1", "64x3s1", "128x2s2", "64x2s2", "64x2s4")
SWEEP_CASES = (
    ("opt-6.7b", 16, 1920, (1.0, 0.5, 0.3)),
    ("opt-66b", 64, 1920, (1.0, 0.3)),
    ("llama-2-7b", 16, 3968, (1.0, 0.5, 0.3)),
    ("llama-3.1-8b", 64, 8192, (1.0, 0.5, 0.3)),
    ("llama-3.1-8b", 16, 8192, (1.0, 0.3)),
    ("llama-3.1-8b", 16, 1920, (1.0, 0.3)),
    ("llama-2-7b", 1, 3968, (1.0, 0.5)),
    ("llama-3.1-8b", 1, 8192, (1.0, 0.5)),
)

LENGTHS_CASES = (
    ("llama-2-7b", 64, 3968, (1.0, 0.5)),
    ("llama-3.1-8b", 16, 8192, (1.0, 0.625)),
    ("llama-3.1-8b", 64, 8192, (1.0, 0.625)),
)


def operand_sets(case: AttentionCase, count: int | None = None) -> list[Operands]:
    """`count` sets of random operands; by default enough to touch four times the L2 cache."""
    model, keys = case.model, iter(jax.random.split(jax.random.key(1), 64))
    cache = (case.batch, model.kv_heads, case.cache, model.head_dim)

    @functools.partial(jax.jit, static_argnums=1)
    def normal(key, shape):
        return jax.random.normal(key, shape, jnp.bfloat16)

    def index(key):
        scores = jax.random.uniform(key, (case.batch, model.kv_heads))
        return jnp.sort(jnp.argsort(scores, -1)[:, : case.selected], -1).astype(jnp.int32)

    lengths = jnp.full((case.batch,), case.cache, jnp.int32)
    q = normal(next(keys), (case.batch, model.kv_heads, model.queries, model.head_dim))
    return [
        Operands(q, normal(next(keys), cache), normal(next(keys), cache), lengths, None)
        if case.selected is None
        else Operands(q, normal(next(keys), cache), normal(next(keys), cache), lengths, index(next(keys)))
        for _ in range(count or timing.sets_needed(case.cache_bytes))
    ]


def chain(case: AttentionCase, call: Callable[..., jax.Array], peak: float) -> tuple[Any, int]:
    """A compiled program of several calls, each on its own set of operands, and the number of calls."""
    calls = timing.calls_needed(case.cache_bytes / peak)
    count = timing.sets_needed(case.cache_bytes)
    q, *others = jax.eval_shape(lambda: tuple(vars(operand_sets(case, 1)[0]).values()))
    return timing.chained(call, calls).lower(q, [tuple(others)] * count).compile(), calls


def measure(
    case: AttentionCase,
    sets: list[Operands],
    program: Any,
    calls: int,
    kernel: str,
    peak: float,
    size: int | None = None,
) -> dict[str, Any]:
    """A row of the table, without a time if the result is wrong; `size`: bytes to read, if not all of the cache's."""
    size = case.cache_bytes if size is None else size
    rows = sorted({0, case.batch // 2, case.batch - 1})
    picked = sets[0].rows(rows)
    oracle = functools.partial(reference.sparse_decode_attention, scale=case.model.head_dim**-0.5)
    want = jax.jit(oracle)(*vars(picked).values())
    operands = [tuple(vars(s).values())[1:] for s in sets]
    out = program(sets[0].q, operands)[0][jnp.asarray(rows)].astype(jnp.float32)
    row: dict[str, Any] = {
        "case": str(case),
        "kernel": kernel,
        "error": error(out, want),
        "bytes": size,
    }
    if row["error"] > LIMIT["bfloat16"]:
        return row | {"wrong": True}
    taken = timing.time_call(lambda: program(sets[0].q, operands), calls)
    return row | timing.speed(size, taken, peak)


def _tiles(spec: str, problem: Problem) -> Tiles:
    """ "64x3" is block x stages, with the heuristic's splits; "64x3s2" gives the splits too."""
    size, _, splits = spec.partition("s")
    block, stages = map(int, size.split("x"))
    if splits:
        return Tiles(block=block, stages=stages, splits=int(splits))
    return heuristic(problem, _device.current(), block=block, stages=stages)


def cases_of(named: Sequence[tuple[str, int, int, tuple[float, ...]]]) -> list[AttentionCase]:
    """One for each density of (model, batch, cache length, densities)."""
    return [
        AttentionCase(MODELS[name], batch, cache, density)
        for name, batch, cache, densities in named
        for density in densities
    ]


def problem_of(case: AttentionCase) -> Problem:
    model = case.model
    return Problem(
        batch=case.batch,
        groups=model.kv_heads,
        queries=model.queries,
        width=model.head_dim,
        capacity=case.cache,
        selected=case.selected or model.kv_heads,
    )


def sweep(peak: float, specs: Sequence[str]) -> list[dict[str, Any]]:
    """Every configuration that fits, on every workload of SWEEP_CASES; compiles in parallel, times one by one."""
    cases = cases_of(SWEEP_CASES)
    todo: list[tuple[AttentionCase, str, Tiles]] = []
    for case in cases:
        space = set(search_space(problem_of(case), _device.current()))
        named = ((spec, _tiles(spec, problem_of(case))) for spec in specs)
        todo += [(case, spec, tiles) for spec, tiles in named if tiles in space]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(chain, case, kernel_call(case.model.head_dim**-0.5, tiles=tiles), peak)
            for case, _, tiles in todo
        ]
    rows, dense = [], {}
    for case, of in itertools.groupby(zip(todo, jobs, strict=True), key=lambda each: each[0][0]):
        sets = operand_sets(case)
        for (_, spec, tiles), job in of:
            row = _try(case, sets, job, spec, peak)
            row |= {"block": tiles.block, "stages": tiles.stages, "splits": tiles.splits}
            whole = str(AttentionCase(case.model, case.batch, case.cache, 1.0))
            if "time_us" in row and str(case) == whole:
                dense[whole] = min(row["time_us"], dense.get(whole, row["time_us"]))
            _compare(row, dense.get(whole))
            rows.append(row)
    return rows


def lengths_table(peak: float) -> list[dict[str, Any]]:
    """Lengths drawn log-uniformly from S/32 to S, beside as many of their mean; the same program runs both."""
    rows: list[dict[str, Any]] = []
    for case in cases_of(LENGTHS_CASES):
        program, calls = chain(case, kernel_call(case.model.head_dim**-0.5), peak)
        sets, log = operand_sets(case), np.log(case.cache)
        drawn = np.exp(np.random.default_rng(0).uniform(log - np.log(32), log, case.batch)).astype(np.int32)
        for kind, lengths in (("different", drawn), ("equal", np.full_like(drawn, drawn.mean()))):
            given = [dataclasses.replace(each, lengths=jnp.asarray(lengths)) for each in sets]
            size = case.cache_bytes // (case.batch * case.cache) * int(lengths.sum())
            rows.append(measure(case, given, program, calls, kind, peak, size))
            print(rows[-1], flush=True)
    return rows


def _try(case, sets, job, kernel, peak) -> dict[str, Any]:
    try:
        program, calls = job.result()
        row = measure(case, sets, program, calls, kernel, peak)
    except Exception as failure:  # recorded as a row of the table
        row = {
            "case": str(case),
            "kernel": kernel,
            "failed": f"{type(failure).__name__}: {str(failure)[:200]}",
        }
    problem = row.get("failed") or ("WRONG" if row.get("wrong") else "")
    numbers = " ".join(f"{row[key]:.1f}" for key in ("time_us", "gbps", "pct_peak") if key in row)
    print(f"  {case} {kernel}: {numbers} {problem}", flush=True)
    return row


def _compare(row: dict[str, Any], dense_us: float | None) -> None:
    if dense_us and "time_us" in row:
        row["speedup_vs_dense"] = dense_us / row["time_us"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "sweep", "table", "lengths"))
    parser.add_argument(
        "--tiles",
        nargs="+",
        default=SWEEP,
        help="for sweep: BLOCKxSTAGES or BLOCKxSTAGESsSPLITS, such as 64x3s2",
    )
    parser.add_argument(
        "--models", nargs="*", default=(), choices=tuple(MODELS), help="for table: measure only these"
    )
    parser.add_argument("--seconds", type=float, default=180, help="for table: time limit")
    parser.add_argument("--resume", type=Path, help="for table: JSON lines with rows to skip")
    args = parser.parse_args()
    timing.require_gpu()
    if "check" in args.verbs and not run_checks():
        print("wrong results, so no speed is reported", file=sys.stderr)
        return 1
    if args.verbs == ["check"]:
        return 0
    peak = timing.copy_bandwidth()
    head = report.provenance(copy_gbps=peak / 1e9, read_gbps=timing.read_bandwidth() / 1e9)
    print(head, flush=True)
    rows = []
    if "sweep" in args.verbs:
        rows += _kept(sweep(peak, args.tiles), "decode_attention_sweep.jsonl", head)
    if "table" in args.verbs:
        known = report.read_jsonl(args.resume) if args.resume else []
        for chunk in attention_table.table(peak, args.models, args.seconds, known):
            rows += _kept(chunk, "decode_attention.jsonl", head)
    if "lengths" in args.verbs:
        rows += _kept(lengths_table(peak), "decode_attention_lengths.jsonl", head)
    print(report.table(rows, (*attention_table.COLUMNS, "splits")))
    print(head)
    return int(any(row.get("wrong") for row in rows))


def _kept(rows: list[dict[str, Any]], name: str, head: dict[str, Any]) -> list[dict[str, Any]]:
    if path := report.results_path(name):
        report.append_jsonl(path, rows, head)
    return rows


if __name__ == "__main__":
    sys.exit(main())
