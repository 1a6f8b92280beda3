"""A plot of bench/results/*.jsonl: bytes per second against the bytes that must move, copy bandwidth as the roof.

    python3 -m bench.roofline                 draws bench/results/roofline.png (needs matplotlib)

A kernel that moves its bytes at copy bandwidth lies on the roof; reading alone may exceed it. The dashed line is what
a call can reach if it is idle for 5 microseconds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bench import report
from bench.readme_tables import RESULTS
from bench.table_cells import OTHERS

PICTURE = RESULTS / "roofline.png"
IDLE = 5e-6  # seconds


class Series(NamedTuple):
    """Points of one kind of call: bytes that must move, and bytes per second relative to a copy in the same run."""

    label: str
    color: str
    marker: str
    points: tuple[tuple[float, float], ...]


def _points(rows: list[dict[str, Any]], chosen) -> tuple[tuple[float, float], ...]:
    found = []
    for row in rows:
        seconds = row.get("time_us", 0) / 1e6 or row.get("ms_per_step", 0) / 1e3
        if seconds and "copy_gbps" in row and chosen(row):
            found.append((row["bytes"], row["bytes"] / seconds / 1e9 / row["copy_gbps"]))
    return tuple(sorted(found))


def series(folder: Path = RESULTS) -> list[Series]:
    """All kinds of calls that have rows in the results files."""

    def read(name):
        path = folder / f"{name}.jsonl"
        return report.of_one_device(report.read_jsonl(path)) if path.is_file() else []

    attention, mlp, steps = (read(name) for name in ("decode_attention", "sparse_mlp", "decode"))
    first: dict[tuple[str, str], dict[str, Any]] = {}  # the heuristic's configuration of each run
    for row in mlp:
        if row["kernel"] not in OTHERS:
            first.setdefault((row["case"], row.get("commit", "")), row)

    def ours(row):
        return row["kernel"] == "mosaic"

    def dense(row):
        return row["case"].endswith(" d1")

    found = [
        Series(
            "attention, cuDNN dense", "tab:gray", "x", _points(attention, lambda r: r["kernel"] == "cudnn")
        ),
        Series("attention, dense", "tab:blue", "o", _points(attention, lambda r: ours(r) and dense(r))),
        Series(
            "attention, selected", "tab:cyan", ".", _points(attention, lambda r: ours(r) and not dense(r))
        ),
        Series("MLP, XLA dense", "tab:gray", "+", _points(mlp, lambda r: r["kernel"] == "dense")),
        Series("MLP, selected", "tab:red", "s", _points(list(first.values()), lambda r: not dense(r))),
        Series("decode step, dense", "tab:olive", "^", _points(steps, lambda r: r["kind"] == "dense")),
        Series("decode step, sparse", "tab:green", "v", _points(steps, lambda r: "dense" not in r["kind"])),
    ]
    return [each for each in found if each.points]


def draw(found: list[Series], path: Path, title: str) -> None:
    """Writes the plot. Raises ValueError if there is nothing to draw."""
    if not found:
        raise ValueError(
            f"{path.name}: no rows with a time and a copy bandwidth; got none. Hint: run the benches."
        )
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=110, layout="constrained")
    every = [size for each in found for size, _ in each.points]
    sizes = np.geomspace(min(every) / 1.5, max(every) * 1.5, 200)
    axes.axhline(100, color="black", linewidth=1, label="copy bandwidth")
    copy = 4.2e12  # bytes per second; only the bend of the dashed line depends on it
    axes.plot(
        sizes,
        100 / (1 + IDLE * copy / sizes),
        "--",
        color="black",
        linewidth=0.8,
        label="and 5 µs a call idle",
    )
    for each in found:
        x, y = zip(*each.points, strict=True)
        axes.plot(
            x, [100 * share for share in y], each.marker, color=each.color, markersize=5, label=each.label
        )
    axes.set(
        xscale="log", ylim=(0, 120), xlabel="bytes that must move", ylabel="% of copy bandwidth", title=title
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    figure.savefig(path)
    plt.close(figure)


def title(folder: Path = RESULTS) -> str:
    """Devices, versions and copy bandwidths of the rows in the plot."""
    rows = [
        row
        for path in sorted(folder.glob("*.jsonl"))
        for row in report.of_one_device(report.read_jsonl(path))
        if {"copy_gbps", "jax"} <= row.keys()
    ]
    if not rows:
        return ""
    names = ", ".join(dict.fromkeys(f"{row['device']}, jax {row['jax']}" for row in rows))
    low, high = (f(row["copy_gbps"] for row in rows) for f in (min, max))
    return f"{names}, copies at {low:,.0f} to {high:,.0f} GB/s"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    draw(series(), PICTURE, title())
    print(f"{PICTURE.relative_to(report.ROOT)}: {PICTURE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
