"""Selective MLP on a GPU: correctness against the float32 oracle first, then device time.

    python3 -m bench.bench_sparse_mlp check            adversarial small calls of every kind, each kind a process
    python3 -m bench.bench_sparse_mlp sweep            candidate tiles on a few workloads
    python3 -m bench.bench_sparse_mlp table [--models] the named workloads, beside XLA's dense and gathered products

Several verbs run one after the other; `--seconds` ends the measuring early. With the variable OUT set, JSON lines
go into that folder. A kind of kernel that fails its check, or hangs in it, isn't measured.
"""

import argparse
import functools
import itertools
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report, timing
from bench.workloads import BATCHES, MODELS, ModelShape
from pallas_kernels import _device
from pallas_kernels.sparse_mlp import mosaic, reference, xla
from pallas_kernels.sparse_mlp.plan import Plan
from pallas_kernels.sparse_mlp.tiles import BATCHES as PADDED
from pallas_kernels.sparse_mlp.tiles import Tiles, candidates, heuristic

LIMIT = {"bfloat16": 8e-3, "float16": 2e-3}  # |out - oracle| / |oracle|, both as vectors
KINDS = ("fused-bulk", "split-bulk", "fused-async", "split-async")
COLUMNS = ("case", "kernel", "time_us", "spread_us", "bytes", "gbps", "pct_peak", "speedup_vs_dense", "error")
TABLE_MODELS = ("opt-6.7b", "opt-30b", "opt-66b", "llama-2-7b", "llama-3.1-70b")
DENSITIES = (0.1, 0.3, 0.5, 1.0)
# (model, batch, densities, whether every candidate is tried)
SWEEP = (
    ("opt-66b", 16, (0.1, 0.3), True),
    ("opt-66b", 64, (0.1, 0.3), True),
    ("opt-6.7b", 64, (0.3,), True),
    ("opt-6.7b", 16, (0.3,), True),
    ("opt-66b", 256, (0.1, 0.3), False),
    ("opt-66b", 1, (0.1, 0.3), False),
    ("opt-6.7b", 1, (0.1, 0.3), False),
    ("opt-6.7b", 16, (0.1,), False),
    ("opt-6.7b", 64, (0.1,), False),
    ("opt-6.7b", 256, (0.1, 0.3), False),
)


def kind(tiles: Tiles) -> str:
    return f"{'fused' if tiles.fused else 'split'}-{tiles.copy}"


def brief(tiles: Tiles) -> str:
    """Kind, warpgroups, groups, columns x stages, the input's columns x slots."""
    shape = f"w{tiles.warpgroups} g{tiles.groups} {tiles.cols}x{tiles.stages} x{tiles.x_cols}x{tiles.x_slots}"
    return f"{kind(tiles)} {shape}"


# ---- correctness -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Check:
    """A small adversarial call: shapes, number of absent entries, what is in it."""

    batch: int = 16
    d_model: int = 1024
    num_neurons: int = 1000
    selected: int = 256
    absent: int = 5
    activation: str = "relu"
    gated: bool = False
    bias: bool = True
    dtype: str = "bfloat16"
    tiles: Tiles | None = None


def checks() -> Iterator[Check]:
    """What must be right before anything is timed."""
    yield Check()
    for batch, dtype in zip((1, 8, 17, 64, 100, 128, 200), itertools.cycle(LIMIT)):
        yield Check(batch=batch, dtype=dtype, selected=384)
        yield Check(batch=batch, dtype=dtype, activation="silu", gated=True, bias=batch % 2 == 0)
    for d_model in (128, 640, 768, 2560):
        yield Check(d_model=d_model, selected=100)
    yield Check(absent=256)
    yield Check(selected=1, absent=0)
    yield Check(num_neurons=20000, selected=12800, d_model=4096)
    yield Check(num_neurons=20000, selected=12800, d_model=4096, batch=64, gated=True)
    for batch in PADDED:
        for tiles in candidates(batch, 2048, _device.HOPPER):
            yield Check(batch=batch, d_model=2048, selected=640, tiles=tiles)


def poisoned(check: Check) -> dict[str, Any]:
    """The call's operands: entries permuted, repeated, absent; NaN in every row that isn't named."""
    rng = np.random.default_rng(zlib.crc32(repr(check).encode()))
    index = rng.choice(check.num_neurons, check.selected, replace=False).astype(np.int32)
    index[-1] = index[0]
    index[rng.choice(check.selected, check.absent, replace=False)] = -1
    unnamed = np.setdiff1d(np.arange(check.num_neurons), index)
    shape = (check.num_neurons, check.d_model)

    def draw(*shape, scale=1.0, poison=True):
        values = rng.standard_normal(shape, np.float32) * scale
        if poison:
            values[unnamed] = np.nan
        return values

    operands = {
        "x": draw(check.batch, check.d_model, poison=False),
        "w_up": draw(*shape, scale=shape[1] ** -0.5),
    }
    operands |= {"w_down": draw(*shape, scale=check.selected**-0.5)}
    if check.gated:
        operands["w_gate"] = draw(*shape, scale=shape[1] ** -0.5)
    if check.bias:
        operands |= {f"b_{name}": draw(shape[0]) for name in ("up", "gate")[: 1 + check.gated]}
    operands = {name: jnp.asarray(array, check.dtype) for name, array in operands.items()}
    return operands | {"index": jnp.asarray(index)}


def run_checks(which: str) -> bool:
    """Prints one line a check of a kind of kernel; whether all are right."""
    right = True
    for check in checks():
        started = time.perf_counter()
        tiles = check.tiles or heuristic(
            min(check.batch, 128), check.d_model, _device.HOPPER, gated=check.gated
        )
        if check.tiles is None:
            try:
                tiles = replace(tiles, fused=which.startswith("fused"), copy=which.split("-")[1])
            except ValueError:
                continue
        if kind(tiles) != which:
            continue
        operands = poisoned(check)
        call = functools.partial(
            mosaic.sparse_mlp, activation=check.activation, tiles=tiles, device=_device.current()
        )
        oracle = functools.partial(reference.reference, activation=check.activation)
        want = np.asarray(jax.jit(oracle)(**operands))
        run = jax.jit(call)
        found = max(error(run(**operands), want) for _ in range(3))
        fine = found <= LIMIT[check.dtype]
        right &= fine
        seconds = time.perf_counter() - started
        print(
            f"{'ok  ' if fine else 'FAIL'} {found:8.1e} {seconds:5.1f}s {_given(check)} {brief(tiles)}",
            flush=True,
        )
    return right


def _given(check: Check) -> str:
    given = {n: v for n, v in vars(check).items() if v != getattr(Check, n, None) and n != "tiles"}
    return ", ".join(f"{name}={value}" for name, value in given.items()) or "defaults"


def error(out: Any, want: Any) -> float:
    """|out - want| / |want| as vectors; infinite where anything is not a number."""
    out, want = np.asarray(out, np.float64), np.asarray(want, np.float64)
    if out.shape != want.shape or not np.isfinite(out).all():
        return float("inf")
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(out - want)) / norm if norm else float(np.abs(out).max())


def check_kinds(kinds: Sequence[str], seconds: float) -> tuple[str, ...]:
    """Those kinds of kernels that pass all checks, each in its own process, side by side."""
    command = [sys.executable, "-m", "bench.bench_sparse_mlp", "check", "--here", "--kinds"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = {
        which: subprocess.Popen(
            [*command, which], env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, **options
        )
        for which in kinds
    }
    passed, deadline = [], time.monotonic() + seconds
    for which, process in running.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nno result after {seconds:.0f} s"
        lines = output.strip().splitlines()
        good = sum(line.startswith("ok") for line in lines)
        print(f"{which}: exit {process.returncode}, {good} right", flush=True)
        if process.returncode:
            print("\n".join(line for line in lines if not line.startswith("ok"))[-3000:], flush=True)
        else:
            passed.append(which)
    return tuple(passed)


# ---- speed -----------------------------------------------------------------------------------------------


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
        sets = [(params,)] if dense else [(params, index) for index in index_sets(case)]
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

    def halves(self, case: MlpCase, tiles: Tiles) -> None:
        """Times the two products of a split kernel one by one, without what is between them."""
        if self.over() or kind(tiles) not in self.kinds:
            return
        params, sets = weights(case.model), index_sets(case)
        model = case.model
        plan = Plan(
            model.d_model, model.d_ff, case.selected, model.gated, model.activation, "bfloat16", tiles
        )
        x = jnp.ones((tiles.batch, model.d_model), jnp.bfloat16)
        hidden = jnp.ones(plan.hidden, jnp.bfloat16)
        up = {"x": x} | {name: array for name, array in params.items() if name != "w_down"}
        down = {"hidden": hidden, "w_down": params["w_down"]}
        shares = {
            "up": case.bytes - case.selected * model.d_model * 2,
            "down": case.selected * model.d_model * 2,
        }
        for name, operands in (("up", up), ("down", down)):
            run = jax.jit(
                lambda sets, operands: [mosaic.products(plan, {"index": i, **operands}) for i in sets]
            )
            many = (sets * 8)[:8]
            seconds, spread = timing.seconds_per_call(functools.partial(run, many, operands), len(many))
            rate = shares[name] / seconds
            row = {"case": str(case), "kernel": f"{name} only, {brief(tiles)}", "bytes": shares[name]}
            row |= {"time_us": seconds * 1e6, "spread_us": spread * 1e6, "gbps": rate / 1e9}
            row["pct_peak"] = 100 * rate / self.peak
            self.rows.append(row)
            self._show(row)


def _dense(model: ModelShape, x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    act = xla.ACTIVATIONS[model.activation]
    up = x @ params["w_up"].T + params.get("b_up", jnp.zeros((), x.dtype))
    hidden = act(x @ params["w_gate"].T) * up if model.gated else act(up)
    return hidden @ params["w_down"]


def sweep(bench: Bench) -> None:
    """Candidates on a few workloads, the important ones first."""
    for name, batch, densities, every in SWEEP:
        model = MODELS[name]
        bench.dense(model, batch)
        for density in densities:
            case = MlpCase(model, batch, density)
            tried = candidates(min(batch, 128), model.d_model, _device.current())
            for tiles in itertools.islice(tried, None if every else 2):
                bench.selective(case, tiles)
            if every and density == densities[0]:
                for copy in ("bulk", "async"):
                    best = heuristic(batch, model.d_model, _device.current())
                    bench.halves(case, replace(best, fused=False, copy=copy))
                bench.gathered(case)


def table(bench: Bench, models: Sequence[str]) -> None:
    """The named workloads with the heuristic's tiles, beside plain XLA."""
    for name, batch in itertools.product(models, BATCHES):
        model = MODELS[name]
        bench.dense(model, batch)
        for density in DENSITIES:
            case = MlpCase(model, batch, density)
            bench.selective(
                case, heuristic(min(batch, 128), model.d_model, _device.current(), gated=model.gated)
            )
            if density <= 0.5:
                bench.gathered(case)
        if name != models[-1] and batch == BATCHES[-1]:
            weights.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "sweep", "table"))
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--models", nargs="+", default=TABLE_MODELS, choices=tuple(MODELS))
    parser.add_argument("--seconds", type=float, default=150, help="for measuring, after the checks")
    parser.add_argument("--check-seconds", type=float, default=75, help="for the checks of all kinds")
    parser.add_argument("--here", action="store_true", help="check in this process")
    args = parser.parse_args()
    kinds = args.kinds
    if "check" in args.verbs:
        if args.here:
            return sum(not run_checks(which) for which in kinds)
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
    print(report.table(bench.rows, COLUMNS))
    if path := report.results_path("sparse_mlp.jsonl"):
        report.append_jsonl(path, bench.rows, bench.head)
    print(bench.head)
    return int(any(row.get("wrong") for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
