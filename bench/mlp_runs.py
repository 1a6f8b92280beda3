"""Runs of the selective MLP's benchmark: programs are compiled in parallel, then checked and timed one at a time."""

import functools
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report, timing
from bench.check_sparse_mlp import LIMIT, brief, error, kind
from bench.workloads import ModelShape
from pallas_kernels import _device
from pallas_kernels.sparse_mlp import reference, xla
from pallas_kernels.sparse_mlp.mosaic import launch as mosaic
from pallas_kernels.sparse_mlp.tiles import BATCHES as PADDED
from pallas_kernels.sparse_mlp.tiles import Tiles, candidates

CALLS = 8  # chained in a program
UNTUNED = {"xla_gpu_autotune_level": 0}  # for oracles: they compile in parallel, so XLA must not autotune


@dataclass(frozen=True)
class MlpCase:
    """One decode MLP: a model's layer, a batch, a density of neurons."""

    model: ModelShape
    batch: int
    density: float

    @property
    def selected(self) -> int:
        """Number of neurons kept: density · F, rounded up to a multiple of 128."""
        return min(self.model.d_ff, -(-int(self.density * self.model.d_ff) // 128) * 128)

    @property
    def row_bytes(self) -> int:
        """Bytes of one neuron's weights."""
        return self.model.d_model * 2 * (3 if self.model.gated else 2)

    @property
    def bytes(self) -> int:
        """Bytes of the selected weights."""
        return self.selected * self.row_bytes

    @property
    def sets(self) -> int:
        """Number of selections to rotate through, so that a call finds none of its rows in the L2 cache."""
        return min(CALLS, max(2, timing.sets_needed(self.bytes)))

    def __str__(self) -> str:
        return f"{self.model.name} B{self.batch} d{self.density:g}"


def choices(case: MlpCase) -> list[Tiles]:
    """Configurations to measure, the heuristic's first."""
    shape = (min(case.batch, PADDED[-1]), case.model.d_model, _device.current())
    return candidates(*shape, selected=case.selected, gated=case.model.gated)


def weight_shapes(model: ModelShape) -> dict[str, jax.ShapeDtypeStruct]:
    """Weights of one layer, bfloat16."""
    matrices = ("w_up", "w_down", *(["w_gate"] if model.gated else []))
    shapes = dict.fromkeys(matrices, (model.d_ff, model.d_model)) | (
        {} if model.gated else {"b_up": (model.d_ff,)}
    )
    return {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}


@functools.cache
def weights(model: ModelShape) -> dict[str, jax.Array]:
    """Random weights, scaled so that a tenth of the neurons gives results as large as the input."""
    scales = {"w_down": (20 / model.d_ff) ** 0.5, "b_up": 0.1}

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key, shape, scale):
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)

    shapes = weight_shapes(model)
    keys = jax.random.split(jax.random.key(7), len(shapes))
    return {
        name: normal(key, shape.shape, scales.get(name, model.d_model**-0.5))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def index_sets(case: MlpCase) -> list[jax.Array]:
    """Sorted selections, disjoint if there are enough neurons."""
    rng, found = np.random.default_rng(3), []
    while len(found) < case.sets:
        order = rng.permutation(case.model.d_ff)
        pieces = [order[i : i + case.selected] for i in range(0, case.model.d_ff, case.selected)]
        found += [np.sort(piece) for piece in pieces if len(piece) == case.selected]
    return [jnp.asarray(piece, jnp.int32) for piece in found[: case.sets]]


@dataclass(frozen=True)
class Run:
    """One kernel on one case. `dense` computes all neurons and takes no index."""

    case: MlpCase
    kernel: str
    call: Callable[..., jax.Array]
    ours: Tiles | None = None
    dense: bool = False

    def programs(self) -> tuple[Any, Any]:
        """The compiled chain of calls, and the oracle for the first call."""
        case, params = self.case, weight_shapes(self.case.model)
        x = jax.ShapeDtypeStruct((case.batch, case.model.d_model), jnp.bfloat16)
        index = jax.ShapeDtypeStruct((case.selected,), jnp.int32)
        sets = [(params,)] if self.dense else [(params, index)] * case.sets
        oracle = jax.jit(functools.partial(reference.reference, **_act(case.model)))
        chain = timing.chained(self.call, CALLS)
        return chain.lower(x, sets).compile(), oracle.lower(x=x, index=index, **params).compile(UNTUNED)

    def time(self, programs: tuple[Any, Any], peak: float) -> dict[str, Any]:
        """Error, time and rate; no time if the result is wrong."""
        (chain, oracle), case, params = programs, self.case, weights(self.case.model)
        indices = index_sets(case)
        sets: list[Any] = [(params,)] if self.dense else [(params, index) for index in indices]
        x = jax.random.normal(jax.random.key(1), (case.batch, case.model.d_model), jnp.bfloat16)
        found = error(chain(x, sets)[0].astype(jnp.float32), oracle(x=x, index=indices[0], **params))
        if not found <= LIMIT["bfloat16"]:
            return {"error": found, "wrong": True}
        taken = timing.time_call(lambda: chain(x, sets), CALLS)
        return {"error": found} | timing.speed(case.bytes, taken, peak)


def _act(model: ModelShape) -> dict[str, Any]:
    return {"activation": model.activation, "threshold": model.threshold}


def dense(model: ModelShape, batch: int) -> Run:
    """Runs XLA's products with all neurons."""
    return Run(MlpCase(model, batch, 1.0), "dense", functools.partial(_dense, model), dense=True)


def gathered(case: MlpCase) -> Run:
    """Runs XLA's take and dot."""
    call = functools.partial(xla.sparse_mlp, **_act(case.model))
    return Run(case, "take+dot", lambda x, params, index: call(x, index=index, **params))


def selective(case: MlpCase, tiles: Tiles) -> Run:
    """Runs our kernel with a configuration."""
    call = functools.partial(mosaic.sparse_mlp, **_act(case.model), tiles=tiles, device=_device.current())
    return Run(case, brief(tiles), lambda x, params, index: call(x, index=index, **params), tiles)


def _dense(model: ModelShape, x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    act = xla.activation_function(**_act(model))
    up = x @ params["w_up"].T + params.get("b_up", jnp.zeros((), x.dtype))
    hidden = act(x @ params["w_gate"].T) * up if model.gated else act(up)
    return hidden @ params["w_down"]


class Bench:
    """Measures runs, keeps the dense times for comparison, and stops when time runs out."""

    def __init__(self, kinds: Iterable[str], seconds: float):
        self.kinds, self.deadline = tuple(kinds), time.monotonic() + seconds
        self.peak = timing.copy_bandwidth()
        self.head = report.provenance(copy_gbps=self.peak / 1e9, read_gbps=timing.read_bandwidth() / 1e9)
        self.rows: list[dict[str, Any]] = []
        self.dense_us: dict[tuple[str, int], float] = {}
        print(self.head, flush=True)

    def measure(self, runs: Iterable[Run]) -> None:
        """Appends one row per run, dense runs first; a wrong result has no time."""
        wanted = [run for run in runs if run.ours is None or kind(run.ours) in self.kinds]
        # XLA autotunes its products, so those are compiled one at a time.
        with ThreadPoolExecutor(os.cpu_count()) as many, ThreadPoolExecutor(1) as one:
            jobs = [(run, (many if run.ours else one).submit(run.programs)) for run in wanted]
        for run, job in jobs:
            if time.monotonic() > self.deadline:
                print("out of time", flush=True)
                return
            self._append(run, job)

    def _append(self, run: Run, job: Future[Any]) -> None:
        row: dict[str, Any] = {"case": str(run.case), "kernel": run.kernel, "bytes": run.case.bytes}
        try:
            row |= run.time(job.result(), self.peak)
        except Exception as failure:  # recorded as a row of the table
            row["failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"
        key = (run.case.model.name, run.case.batch)
        if run.dense and "time_us" in row:
            self.dense_us[key] = row["time_us"]
        if "time_us" in row and key in self.dense_us:
            row["speedup_vs_dense"] = self.dense_us[key] / row["time_us"]
        self.rows.append(row)
        if path := report.results_path("sparse_mlp.jsonl"):
            report.append_jsonl(path, [row], self.head)
        numbers = " ".join(
            f"{row[name]:8.2f}" for name in ("time_us", "pct_peak", "speedup_vs_dense") if name in row
        )
        problem = row.get("failed") or (f"WRONG {row['error']:.1e}" if row.get("wrong") else "")
        print(f"  {row['case']:24s} {row['kernel']:42s} {numbers} {problem}", flush=True)

    def timeline(self, case: MlpCase, tiles: Tiles) -> None:
        """Prints how long each kernel of a chain of calls took and the gap before it, as medians by name."""
        chain = timing.chained(selective(case, tiles).call, CALLS)
        x = jax.random.normal(jax.random.key(1), (case.batch, case.model.d_model), jnp.bfloat16)
        sets = [(weights(case.model), index) for index in index_sets(case)]
        print(f"{case}, {brief(tiles)}: kernel, count, us, us before it", flush=True)
        for name, count, length, gap in timing.timeline(lambda: chain(x, sets)):
            print(f"  {name[:60]:60s} {count:4d} {length:8.2f} {gap:8.2f}", flush=True)
