"""The table of decode attention: our kernel, plain XLA and cuDNN on every named workload, within a time budget.

The most important workloads come first, in chunks: the programs of a chunk are lowered, compiled in parallel, and only
then timed, one at a time on an idle machine. Models whose attention has the same shape are measured once.
"""

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import timing
from bench.workloads import BATCHES, DENSITIES, MODELS, AttentionCase, attention_cases
from pallas_kernels import _device
from pallas_kernels.decode_attention import mosaic, reference, xla

LIMIT = 8e-3  # |out - oracle| / |oracle|, both as vectors
CHECKED = 3  # sequences compared with the oracle
CHUNK = 40  # programs compiled at the same time
MAX_BYTES = 20e9  # largest whole cache to measure
FIRST = ("opt-6.7b", "opt-66b", "llama-3.1-8b", "llama-2-7b", "llama-3.1-70b", "opt-30b", "qwen2.5-14b")
COLUMNS = ("case", "kernel", "time_us", "spread_us", "bytes", "gbps", "pct_peak", "speedup_vs_dense", "error")


@dataclass(frozen=True)
class Unit:
    """Calls that share a cache: one layer, B sequences of `cache` tokens; with `compared`, also other libraries'."""

    case: AttentionCase  # dense
    densities: tuple[float, ...]
    compared: bool
    same: tuple[str, ...]  # models whose attention has this shape

    def at(self, density: float) -> AttentionCase:
        return AttentionCase(self.case.model, self.case.batch, self.case.cache, density)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of the queries, and of the keys and the values."""
        model, batch = self.case.model, self.case.batch
        head = model.head_dim
        return (batch, model.kv_heads, model.queries, head), (batch, model.kv_heads, self.case.cache, head)

    def calls(self) -> Iterator[tuple[str, float, Callable[..., jax.Array], int]]:
        """(kernel, density, call, number of chained calls in a program)."""
        scale = self.case.model.head_dim**-0.5
        ours = functools.partial(mosaic.sparse_decode_attention, scale=scale, device=_device.current())
        for density in self.densities:
            floor = self.at(density).cache_bytes / 4e12
            yield "mosaic", density, ours, timing.calls_needed(floor)
            if self.compared and density in (1.0, 0.3):
                yield "xla", density, functools.partial(xla.sparse_decode_attention, scale=scale), 2
            if self.compared and density == 1.0:
                yield "cudnn", density, functools.partial(cudnn, scale=scale), 4


def units(models: Sequence[str], max_bytes: float = MAX_BYTES) -> list[Unit]:
    """Every named workload once: batch 16 and 64 come first, and densities 1 and .3 within them."""
    same: dict[tuple[int, ...], list[AttentionCase]] = {}
    order = [*FIRST, *(name for name in MODELS if name not in FIRST)]
    cases = [case for case in attention_cases(max_bytes) if case.density == 1]
    for case in sorted(cases, key=lambda case: order.index(case.model.name)):
        model = case.model
        key = (case.batch, case.cache, model.kv_heads, model.queries, model.head_dim)
        same.setdefault(key, []).append(case)
    found = [equal for equal in same.values() if not models or {c.model.name for c in equal} & set(models)]
    important = (16, 64)
    others = tuple(d for d in DENSITIES if d not in (1.0, 0.3))
    rounds = (
        (important, (1.0, 0.3), True),
        (important, others, False),
        (tuple(b for b in BATCHES if b not in important), (1.0, 0.3), True),
        (tuple(b for b in BATCHES if b not in important), others, False),
    )
    return [
        Unit(equal[0], densities, compared, tuple(case.model.name for case in equal))
        for batches, densities, compared in rounds
        for equal in found
        if equal[0].batch in batches
    ]


def cudnn(q, k, v, lengths, index, *, scale):
    """cuDNN's dense attention; reinterprets the bytes of k and v in its own layout, [B S K H]."""
    batch, groups, queries, width = q.shape
    k, v = (x.reshape(batch, -1, groups, width) for x in (k, v))
    out = jax.nn.dot_product_attention(
        q.reshape(batch, 1, groups * queries, width),
        k,
        v,
        key_value_seq_lengths=lengths,
        query_seq_lengths=jnp.ones_like(lengths),
        scale=scale,
        implementation="cudnn",
    )
    return out.reshape(q.shape)


def oracles(rows, q, k, v, lengths, index):
    """Expected results of the sequences `rows`: with k, v as [B K S H], and dense with their bytes as [B S K H]."""
    q, k, v, lengths, index = (x[rows] for x in (q, k, v, lengths, index))
    oracle = functools.partial(reference.sparse_decode_attention, scale=q.shape[-1] ** -0.5)
    k_other, v_other = (x.reshape(x.shape[0], -1, *x.shape[1::2]).swapaxes(1, 2) for x in (k, v))
    return oracle(q, k, v, lengths, index), oracle(q, k_other, v_other, lengths, None)


# ---- programs ----------------------------------------------------------------------------------------------


def lowered(unit: Unit) -> dict[Any, Any]:
    """Every program of a unit by name, or the exception if it cannot be lowered."""
    q_shape, kv_shape = unit.shapes
    batch = q_shape[0]
    q, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q_shape, kv_shape))
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def index(selected):
        return None if selected is None else jax.ShapeDtypeStruct((batch, selected), jnp.int32)

    rows = jax.ShapeDtypeStruct((CHECKED,), jnp.int32)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    make = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), kv_shape, jnp.bfloat16))
    programs: dict[Any, Any] = {
        "make": make.lower(seed),
        "oracle": jax.jit(oracles).lower(rows, q, kv, kv, lengths, index(kv_shape[1])),
    }
    for kernel, density, call, calls in unit.calls():
        operands = (kv, kv, lengths, index(unit.at(density).selected))
        try:
            programs[kernel, density] = jax.jit(timing.chained(call, calls)).lower(q, [operands] * calls)
        except Exception as failure:  # recorded as a row of the table
            programs[kernel, density] = failure
    return programs


def compiled(program: Any) -> Any:
    """The compiled program, or the reason why it did not compile."""
    if isinstance(program, Exception):
        return program
    try:
        return program.compile()
    except Exception as failure:  # also recorded
        return failure


# ---- operands ----------------------------------------------------------------------------------------------


class Operands:
    """Enough caches to rotate past the L2 cache, and selections that use all their bytes before any repeats."""

    def __init__(self, unit: Unit, make: Callable[..., jax.Array]) -> None:
        q_shape, kv_shape = unit.shapes
        self.unit, self.groups = unit, kv_shape[1]
        self.rng = np.random.default_rng(0)
        self.q = jnp.asarray(self.rng.standard_normal(q_shape, np.float32).astype(jnp.bfloat16))
        self.lengths = jnp.full((q_shape[0],), unit.case.cache, jnp.int32)
        count = timing.sets_needed(unit.case.cache_bytes // 2)
        self.caches = [(make(np.int32(2 * i)), make(np.int32(2 * i + 1))) for i in range(count)]

    def sets(self, density: float) -> list[tuple[Any, ...]]:
        """(k, v, lengths, index) for each call in turn."""
        selected = self.unit.at(density).selected
        if selected is None:
            return [(k, v, self.lengths, None) for k, v in self.caches]
        order = self.rng.random((self.q.shape[0], self.groups)).argsort(-1).astype(np.int32)
        disjoint = [
            jnp.asarray(np.sort(order[:, first : first + selected], -1))
            for first in range(0, self.groups - selected + 1, selected)
        ]
        return [(k, v, self.lengths, index) for index in disjoint for k, v in self.caches]


def measure(unit: Unit, programs: dict[Any, Any], peak: float) -> Iterator[dict[str, Any]]:
    """A row for each call of the unit; it has no time if the result is wrong or missing."""
    needed = [programs[name] for name in ("make", "oracle")]
    if failure := next((program for program in needed if isinstance(program, Exception)), None):
        raise failure
    make, oracle = needed
    operands = Operands(unit, make)
    rows = np.linspace(0, unit.case.batch - 1, CHECKED).astype(np.int32)
    for kernel, density, _, calls in unit.calls():
        case = unit.at(density)
        row = {"case": str(case), "kernel": kernel, "bytes": case.cache_bytes, "same": list(unit.same)}
        sets = operands.sets(density)
        try:
            yield row | _timed(programs[kernel, density], operands.q, sets, calls, peak, row, oracle, rows)
        except Exception as failure:  # also recorded
            yield row | {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"}


def _timed(program, q, sets, calls, peak, row, oracle, rows) -> dict[str, Any]:
    if isinstance(program, Exception):
        raise program
    turns = itertools.cycle(
        [[sets[(first + i) % len(sets)] for i in range(calls)] for first in range(0, len(sets), calls)]
    )
    first_set = next(turns)
    out = np.asarray(program(q, first_set)[0], np.float32)[rows]
    k, v, lengths, index = first_set[0]
    named = np.full((q.shape[0], q.shape[1]), -1, np.int32)
    entries = np.arange(q.shape[1], dtype=np.int32)[None, :] if index is None else np.asarray(index)
    named[:, : entries.shape[1]] = entries
    want = oracle(rows, q, k, v, lengths, named)[row["kernel"] == "cudnn"]
    wrong = error(out, want)
    if wrong > LIMIT:
        return {"error": wrong, "wrong": True}
    taken = timing.time_call(lambda: program(q, next(turns)), calls)
    return {"error": wrong} | timing.speed(row["bytes"], taken, peak)


def error(out: Any, want: Any) -> float:
    """|out - want| / |want| as vectors; infinite if any element is NaN or infinite."""
    out, want = np.asarray(out, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(out).all():
        return float("inf")
    return float(np.linalg.norm(out - want) / np.linalg.norm(want))


# ---- the table ---------------------------------------------------------------------------------------------


def table(
    peak: float, models: Sequence[str], seconds: float, known: Sequence[dict[str, Any]] = ()
) -> Iterator[list[dict[str, Any]]]:
    """The rows, chunk by chunk, until the next chunk would not finish within `seconds`.

    known: rows measured before; a unit with nothing new is skipped.
    """
    done = {(row["case"], row["kernel"]): row["time_us"] for row in known if "time_us" in row}
    dense = {case: time_us for (case, kernel), time_us in done.items() if kernel == "mosaic"}
    started = time.monotonic()
    left = [
        unit for unit in units(models) if any((str(unit.at(d)), n) not in done for n, d, _, _ in unit.calls())
    ]
    longest = 0.0
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        while left and time.monotonic() - started + longest < seconds:
            began = time.monotonic()
            chunk: list[tuple[Unit, dict[Any, Any]]] = []
            while left and sum(len(programs) for _, programs in chunk) < CHUNK:
                unit = left.pop(0)
                chunk.append((unit, {name: pool.submit(compiled, p) for name, p in lowered(unit).items()}))
            ready = [(unit, {name: job.result() for name, job in jobs.items()}) for unit, jobs in chunk]
            compiling = time.monotonic() - began
            rows = [row for unit, programs in ready for row in _compared(unit, programs, peak, dense)]
            longest = max(longest, time.monotonic() - began)
            print(
                f"# {sum(len(p) for _, p in ready)} programs compiled in {compiling:.0f} s, measured in "
                f"{time.monotonic() - began - compiling:.0f} s; {len(left)} workloads left",
                flush=True,
            )
            yield rows


def _compared(
    unit: Unit, programs: dict[Any, Any], peak: float, dense: dict[str, float]
) -> Iterator[dict[str, Any]]:
    for row in measure(unit, programs, peak):
        if row["kernel"] == "mosaic" and row["case"] == str(unit.case) and "time_us" in row:
            dense[str(unit.case)] = row["time_us"]
        if "time_us" in row and str(unit.case) in dense:
            row["speedup_vs_dense"] = dense[str(unit.case)] / row["time_us"]
        numbers = " ".join(f"{row[key]:.1f}" for key in ("time_us", "gbps", "pct_peak") if key in row)
        problem = row.get("failed") or ("WRONG" if row.get("wrong") else "")
        print(f"  {row['case']} {row['kernel']}: {numbers} {problem}", flush=True)
        yield row
