"""Up to which density the sparse MLP kernel is faster than the dense MLP, from `bench/results/sparse_mlp.jsonl`."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import ROOT, read_jsonl
from bench.workloads import MLP_MODELS

TABLE = ROOT / "bench" / "results" / "sparse_mlp.jsonl"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Measured times of one MLP shape at one batch size.

    Attributes:
      shape, batch, gated: what was measured.
      dense: time of the dense MLP in microseconds.
      densities, times: of the sparse one, ascending.
    """

    shape: str
    batch: int
    gated: bool
    dense: float
    densities: tuple[float, ...]
    times: tuple[float, ...]

    def speedup(self, density: float) -> float | None:
        """Times as fast as the dense MLP, linear in time between measured densities; None below the lowest one."""
        if density < self.densities[0]:
            return None
        return self.dense / float(np.interp(density, self.densities, self.times))

    @property
    def break_even(self) -> float:
        """The highest density at which the sparse MLP is as fast as the dense one; 0 if it never is."""
        grid = np.linspace(self.densities[0], self.densities[-1], 1000)
        faster = grid[np.interp(grid, self.densities, self.times) <= self.dense]
        return float(faster[-1]) if len(faster) else 0.0


def kernels(*, gated: bool, path: Path = TABLE) -> list[Kernel]:
    """Every shape and batch size of the table whose MLP is gated, or isn't."""
    found: dict[tuple[str, int], dict[Any, float]] = {}
    for row in read_jsonl(path):
        if "time_us" not in row or row["kernel"] == "take+dot":
            continue
        shape, batch, density = row["case"].split()
        times = found.setdefault((shape, int(batch[1:])), {})
        key = "dense" if row["kernel"] == "dense" else float(density[1:])
        times[key] = min(row["time_us"], times.get(key, np.inf))
    made = []
    for (shape, batch), times in sorted(found.items()):
        if MLP_MODELS[shape].gated != gated or "dense" not in times or len(times) < 3:
            continue
        dense, pairs = times.pop("dense"), sorted(times.items())
        densities, spent = zip(*pairs, strict=True)
        made.append(Kernel(shape, batch, gated, dense, densities, spent))
    return made


def nearest_batch(batch: int, found: list[Kernel]) -> int:
    """The smallest measured batch that is at least `batch`; else the largest."""
    measured = sorted({kernel.batch for kernel in found})
    return next((each for each in measured if each >= batch), measured[-1])
