"""Selective MLP on a GPU: checks results against the float32 oracle first, then measures device time.

    python3 -m bench.bench_sparse_mlp check            adversarial small calls of every kind, in several processes
    python3 -m bench.bench_sparse_mlp trace            the device's timeline: each kernel's duration and the gaps
    python3 -m bench.bench_sparse_mlp sweep            candidate tiles on a few workloads
    python3 -m bench.bench_sparse_mlp table [--models] the named workloads, compared with XLA, dense and gathered

Several verbs run one after the other; `--seconds` limits the measuring. If the variable OUT is set, JSON lines are
written to that folder. A kind of kernel that fails its checks, or hangs, isn't measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from bench import report
from bench.check_sparse_mlp import KINDS, check_kinds
from bench.mlp_runs import Bench, MlpCase, Run, choices, dense, gathered, selective, weights
from bench.workloads import BATCHES, DENSITIES, MLP_MODELS, MODELS, ModelShape

COLUMNS = ("case", "kernel", "time_us", "spread_us", "bytes", "gbps", "pct_peak", "speedup_vs_dense", "error")
TABLE_MODELS = (
    "opt-66b",
    "opt-6.7b",
    "llama-2-7b",
    "opt-30b",
    "llama-3.1-70b",
    "qwen2.5-14b",
    "llama-3.1-8b",
    "mistral-7b",
)
IMPORTANT = (16, 64)  # batches, measured first
GATHERED = tuple(
    (batch, density) for batch in (1, 16, 64) for density in (0.1, 0.3)
)  # also by XLA's take + dot
# (model, batch, densities, whether to try every candidate)
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


def trace(bench: Bench) -> None:
    """Prints timelines of the important workloads."""
    for batch, density in ((16, 0.1), (64, 0.1)):
        case = MlpCase(MODELS["opt-66b"], batch, density)
        for tiles in choices(case)[:2]:
            bench.timeline(case, tiles)


def sweep(bench: Bench) -> None:
    """Measures candidates on a few workloads, the important ones first."""
    for name, batch, densities, every in SWEEP:
        model = MODELS[name]
        runs = [dense(model, batch)]
        for density in densities:
            case = MlpCase(model, batch, density)
            runs += [selective(case, tiles) for tiles in choices(case)[: None if every else 2]]
            if every and density == densities[0]:
                runs.append(gathered(case))
        bench.measure(runs)


def table(bench: Bench, models: Sequence[str]) -> None:
    """Measures the named workloads with the heuristic's tiles, and plain XLA; models of equal shape only once."""
    shapes = {
        (m.d_model, m.d_ff, m.gated, m.activation, m.threshold): m
        for m in map(MLP_MODELS.__getitem__, reversed(models))
    }
    for batches in (IMPORTANT, [batch for batch in BATCHES if batch not in IMPORTANT]):
        for model in reversed(shapes.values()):
            weights.cache_clear()
            bench.measure(run for batch in batches for run in _runs(model, batch))


def _runs(model: ModelShape, batch: int) -> Iterator[Run]:
    yield dense(model, batch)
    for case in (MlpCase(model, batch, density) for density in DENSITIES):
        yield selective(case, choices(case)[0])
        if (batch, case.density) in GATHERED:
            yield gathered(case)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "trace", "sweep", "table"))
    parser.add_argument("--kinds", nargs="+", default=tuple(KINDS), choices=tuple(KINDS))
    parser.add_argument("--models", nargs="+", default=TABLE_MODELS, choices=tuple(MLP_MODELS))
    parser.add_argument(
        "--seconds", type=float, default=150, help="time limit for measuring, after the checks"
    )
    parser.add_argument("--check-seconds", type=float, default=100, help="time limit for the checks")
    args = parser.parse_args()
    kinds = args.kinds
    if "check" in args.verbs:
        kinds = check_kinds(kinds, args.check_seconds)
        if not kinds:
            print("wrong results, so no speed is reported", file=sys.stderr)
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
    print(bench.head)
    return int(any(row.get("wrong") for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
