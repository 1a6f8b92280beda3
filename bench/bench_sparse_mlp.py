"""Selective MLP on a GPU: correctness against the float32 oracle first, then device time.

    python3 -m bench.bench_sparse_mlp check            adversarial small calls of every kind, in several processes
    python3 -m bench.bench_sparse_mlp trace            the device's timeline: duration of each kernel, gaps between
    python3 -m bench.bench_sparse_mlp sweep            candidate tiles on a few workloads
    python3 -m bench.bench_sparse_mlp table [--models] the named workloads, beside XLA's dense and gathered products

Several verbs run one after the other; `--seconds` ends the measuring early. With the variable OUT set, JSON lines
go into that folder. A kind of kernel that fails its check, or hangs in it, isn't measured.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report, timing
from bench.check_sparse_mlp import KINDS, LIMIT, brief, check_kinds, error, kind
from bench.workloads import BATCHES, MODELS, ModelShape
from pallas_kernels import _device
from pallas_kernels.sparse_mlp import mosaic, reference, xla
from pallas_kernels.sparse_mlp.tiles import BATCHES as PADDED
from pallas_kernels.sparse_mlp.tiles import Tiles, candidates

COLUMNS = ("case", "kernel", "time_us", "spread_us", "bytes", "gbps", "pct_peak", "speedup_vs_dense", "error")
TABLE_MODELS = ("opt-6.7b", "opt-30b", "opt-66b", "llama-2-7b", "llama-3.1-70b")
DENSITIES = (0.1, 0.3, 0.5, 1.0)
# (model, batch, densities, whether every candidate is tried)
SWEEP = (
    ("opt-66b", 16, (0.1,), True),
    ("opt-66b", 64, (0.1,), True),
    ("opt-66b", 16, (0.3, 1.0), False),
    ("opt-66b", 64, (0.3, 1.0), False),
    ("opt-6.7b", 64, (0.1, 0.3), False),
    ("opt-6.7b", 16, (0.1, 0.3), False),
    ("opt-66b", 1, (0.1, 0.3), False),
    ("opt-66b", 256, (0.1, 0.3), False),
    ("opt-6.7b", 1, (0.1, 0.3), False),
    ("llama-2-7b", 64, (0.3,), False),
)


@dataclass(frozen=True)
class MlpCase:
    """One decode MLP: a model's layer, a batch, a density of neurons."""

    model: ModelShape
    batch: int
    density: float

    @property
    def selected(self) -> int:
        """Neurons: density · F rounded up to a multiple of 128."""
        return min(self.model.d_ff, -(-int(self.density * self.model.d_ff) // 128) * 128)

    @property
    def row_bytes(self) -> int:
        """Bytes of one neuron's weights."""
        return self.model.d_model * 2 * (3 if self.model.gated else 2)

    @property
    def bytes(self) -> int:
        """Bytes of the selected weights."""
        return self.selected * self.row_bytes

    def __str__(self) -> str:
        return f"{self.model.name} B{self.batch} d{self.density:g}"


def choices(case: MlpCase) -> list[Tiles]:
    """Configurations to measure, the heuristic's first."""
    shape = (min(case.batch, PADDED[-1]), case.model.d_model, _device.current())
    return candidates(*shape, selected=case.selected, gated=case.model.gated)


@functools.cache
def weights(model: ModelShape) -> dict[str, jax.Array]:
    """Random weights that neither grow nor shrink what passes through a tenth of them."""
    keys = jax.random.split(jax.random.key(7), 4)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key, shape, scale):
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)

    shape = (model.d_ff, model.d_model)
    made = {"w_up": normal(keys[0], shape, model.d_model**-0.5)}
    made["w_down"] = normal(keys[1], shape, (20 / model.d_ff) ** 0.5)
    if model.gated:
        made["w_gate"] = normal(keys[2], shape, model.d_model**-0.5)
    else:
        made["b_up"] = normal(keys[3], shape[:1], 0.1)
    return made


def index_sets(case: MlpCase) -> list[jax.Array]:
    """Sorted selections, disjoint as far as the neurons go, so that a call finds none of its rows in the L2."""
    count = max(2, timing.sets_needed(case.bytes))
    rng, found = np.random.default_rng(3), []
    while len(found) < count:
        order = rng.permutation(case.model.d_ff)
        pieces = [order[i : i + case.selected] for i in range(0, case.model.d_ff, case.selected)]
        found += [np.sort(piece) for piece in pieces if len(piece) == case.selected]
    return [jnp.asarray(piece, jnp.int32) for piece in found[:count]]


class Bench:
    """Measures; remembers the dense times to compare with and stops when its time is over."""

    def __init__(self, kinds: Iterable[str], seconds: float):
        self.kinds, self.deadline = tuple(kinds), time.monotonic() + seconds
        self.peak = timing.copy_bandwidth()
        self.head = report.provenance(copy_gbps=self.peak / 1e9, read_gbps=timing.read_bandwidth() / 1e9)
        self.rows: list[dict[str, Any]] = []
        self.dense_us: dict[tuple[str, int], float] = {}
        print(self.head, flush=True)

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def measure(self, case: MlpCase, name: str, call: Callable[..., jax.Array], dense: bool = False) -> None:
        """Appends a row; the time is missing when the result is wrong."""
        if self.over():
            return
        row: dict[str, Any] = {"case": str(case), "kernel": name, "bytes": case.bytes}
        try:
            row |= self._row(case, call, dense)
        except Exception as failure:  # a configuration that fails is a row of the table
            row["failed"] = f"{type(failure).__name__}: {str(failure)[:300]}"
        base = self.dense_us.get((case.model.name, case.batch))
        if base and "time_us" in row:
            row["speedup_vs_dense"] = base / row["time_us"]
        self.rows.append(row)
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        keys = ("time_us", "pct_peak", "speedup_vs_dense")
        numbers = " ".join(f"{row[key]:8.2f}" for key in keys if key in row)
        problem = row.get("failed") or (f"WRONG {row['error']:.1e}" if row.get("wrong") else "")
        print(f"  {row['case']:24s} {row['kernel']:42s} {numbers} {problem}", flush=True)

    def _row(self, case: MlpCase, call: Callable[..., jax.Array], dense: bool) -> dict[str, Any]:
        params = weights(case.model)
        sets: list[Any] = [(params,)] if dense else [(params, index) for index in index_sets(case)]
        x = jax.random.normal(jax.random.key(1), (case.batch, case.model.d_model), jnp.bfloat16)
        calls = 8
        chain = timing.chained(call, calls)
        first = chain(x, sets)[0]
        oracle = jax.jit(functools.partial(reference.reference, activation=case.model.activation))
        chosen = jnp.arange(case.model.d_ff, dtype=jnp.int32) if dense else sets[0][1]
        found = error(first.astype(jnp.float32), oracle(x=x, index=chosen, **params))
        row: dict[str, Any] = {"error": found}
        if not found <= LIMIT["bfloat16"]:
            return row | {"wrong": True}
        seconds, spread = timing.seconds_per_call(lambda: chain(x, sets), calls)
        if dense:
            self.dense_us[case.model.name, case.batch] = seconds * 1e6
        rate = case.bytes / seconds
        row |= {"time_us": seconds * 1e6, "spread_us": spread * 1e6, "gbps": rate / 1e9}
        return row | {"pct_peak": 100 * rate / self.peak}

    def timeline(self, case: MlpCase, tiles: Tiles) -> None:
        """Prints how long each kernel of a chain of calls took, and the gap before it, medians by name."""
        options = {"activation": case.model.activation, "tiles": tiles, "device": _device.current()}
        call = functools.partial(mosaic.sparse_mlp, **options)
        chain = timing.chained(lambda x, params, index: call(x, index=index, **params), 8)
        x = jax.random.normal(jax.random.key(1), (case.batch, case.model.d_model), jnp.bfloat16)
        sets = [(weights(case.model), index) for index in index_sets(case)]
        print(f"{case}, {brief(tiles)}: kernel, count, us, us before it", flush=True)
        for name, count, length, gap in timing.timeline(lambda: chain(x, sets)):
            print(f"  {name[:60]:60s} {count:4d} {length:8.2f} {gap:8.2f}", flush=True)

    def dense(self, model: ModelShape, batch: int) -> None:
        if (model.name, batch) not in self.dense_us:
            self.measure(MlpCase(model, batch, 1.0), "dense", functools.partial(_dense, model), dense=True)

    def gathered(self, case: MlpCase) -> None:
        call = functools.partial(xla.sparse_mlp, activation=case.model.activation)
        self.measure(case, "take+dot", lambda x, params, index: call(x, index=index, **params))

    def selective(self, case: MlpCase, tiles: Tiles) -> None:
        if kind(tiles) not in self.kinds:
            return
        options = {"activation": case.model.activation, "tiles": tiles, "device": _device.current()}
        call = functools.partial(mosaic.sparse_mlp, **options)
        self.measure(case, brief(tiles), lambda x, params, index: call(x, index=index, **params))


def _dense(model: ModelShape, x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    act = xla.ACTIVATIONS[model.activation]
    up = x @ params["w_up"].T + params.get("b_up", jnp.zeros((), x.dtype))
    hidden = act(x @ params["w_gate"].T) * up if model.gated else act(up)
    return hidden @ params["w_down"]


def trace(bench: Bench) -> None:
    """Timelines of the important workloads."""
    for batch, density in ((16, 0.1), (64, 0.1)):
        case = MlpCase(MODELS["opt-66b"], batch, density)
        for tiles in choices(case)[:2]:
            bench.timeline(case, tiles)


def sweep(bench: Bench) -> None:
    """Candidates on a few workloads, the important ones first."""
    for name, batch, densities, every in SWEEP:
        model = MODELS[name]
        bench.dense(model, batch)
        for density in densities:
            case = MlpCase(model, batch, density)
            for tiles in choices(case)[: None if every else 2]:
                bench.selective(case, tiles)
            if every and density == densities[0]:
                bench.gathered(case)


def table(bench: Bench, models: Sequence[str]) -> None:
    """The named workloads with the heuristic's tiles, beside plain XLA."""
    for name, batch in itertools.product(models, BATCHES):
        model = MODELS[name]
        bench.dense(model, batch)
        for density in DENSITIES:
            case = MlpCase(model, batch, density)
            bench.selective(case, choices(case)[0])
            if density <= 0.5:
                bench.gathered(case)
        if name != models[-1] and batch == BATCHES[-1]:
            weights.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "trace", "sweep", "table"))
    parser.add_argument("--kinds", nargs="+", default=tuple(KINDS), choices=tuple(KINDS))
    parser.add_argument("--models", nargs="+", default=TABLE_MODELS, choices=tuple(MODELS))
    parser.add_argument("--seconds", type=float, default=150, help="for measuring, after the checks")
    parser.add_argument("--check-seconds", type=float, default=100, help="for the checks of all kinds")
    args = parser.parse_args()
    kinds = args.kinds
    if "check" in args.verbs:
        kinds = check_kinds(kinds, args.check_seconds)
        if not kinds:
            print("wrong results: no speed is reported", file=sys.stderr)
            return 1
    if args.verbs == ["check"]:
        return int(set(kinds) != set(args.kinds))
    bench = Bench(kinds, args.seconds)
    if "sweep" in args.verbs:
        sweep(bench)
    if "table" in args.verbs:
        table(bench, args.models)
    if "trace" in args.verbs:
        trace(bench)
    print(report.table(bench.rows, COLUMNS))
    if path := report.results_path("sparse_mlp.jsonl"):
        report.append_jsonl(path, bench.rows, bench.head)
    print(bench.head)
    return int(any(row.get("wrong") for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
