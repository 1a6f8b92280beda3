"""Pictures made from bench/results/*.jsonl: tokens per second against batch, the time of a decoding step by part, and
what skipping heads costs before and after healing.

    python3 -m bench.pictures     draws decode_batch.png, step_parts.png and quality.png in bench/results

It needs matplotlib. A step's parts are sums of kernel times (bench.step_parts); the mark is the time of the whole step
(bench.bench_decode), which is longer where kernels wait for each other, and shorter where they overlap. A picture
without rows isn't drawn.
"""

import argparse
import bisect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import report
from bench.models import SHAPES, DecodeShape
from bench.readme_tables import NAMES, RESULTS
from bench.step_parts import PARTS
from bench.table_cells import Results

BATCH, STEP, QUALITY = "decode_batch.png", "step_parts.png", "quality.png"
COLORS = dict(
    zip(PARTS, ("tab:blue", "tab:cyan", "tab:red", "tab:orange", "tab:pink", "tab:purple"), strict=False)
)
LINES = (
    ("dense", "tab:blue", "o-"),
    ("sparse", "tab:red", "s-"),
    ("torch", "tab:gray", "x--"),
    ("transformers", "tab:olive", "+:"),
)
TEXTS = {"novels_valid": "held-out novels", "wikitext2_raw_test": "WikiText-2"}
STAGES = {  # and what the stage of its rows looks like
    "published ranking": "published ranking",
    "sparsify": "sparsify with refinement.*code$",
    "tune": "polarjax tune .*--minutes 8.5 .*--router-width 256: ",
}


class Bar(NamedTuple):
    """A step: its label, milliseconds of each part, and of the whole step if that was measured."""

    label: str
    parts: dict[str, float]
    whole: float | None


def speeds(shape: DecodeShape, ours: Results, torch: Results) -> dict[str, list[tuple[int, float]]]:
    """(batch, tokens/s) of each line that has rows; none without ours."""
    found: dict[str, list[tuple[int, float]]] = {}
    for batch in shape.batches:
        case = f"{shape.name} B{batch} S{shape.cache}"
        rows = {
            "dense": ours.get(case, "dense"),
            "sparse": ours.get(case, shape.kind(batch)),
            "torch": torch.get(case, "torch"),
            "transformers": torch.get(case, "transformers"),
        }
        for name, row in rows.items():
            if row is not None:
                found.setdefault(name, []).append((batch, row["tokens_per_s"]))
    return found if "dense" in found else {}


def bars(rows: Sequence[dict[str, Any]], ours: Results) -> list[Bar]:
    """The steps whose parts were measured; the last row of a case and kind counts."""
    last = {(row["case"], row["kind"]): row for row in rows}
    made = []
    for (case, kind), row in last.items():
        whole = ours.get(case, kind)
        name, batch, _ = case.split()
        label = f"{NAMES.get(name, name)}, {batch[1:]}\n{kind}"
        parts = {part: row[part] for part in PARTS if part in row}
        same = whole is not None and whole["device"] == row["device"]
        made.append(Bar(label, parts, whole["ms_per_step"] if whole and same else None))
    return made


def draw_batches(folder: Path) -> bool:
    """Writes the picture of speeds; False if there is nothing to draw."""
    ours, torch = Results.read("decode", folder), Results.read("torch", folder, alone=True)
    found = {NAMES[s.name]: lines for s in SHAPES.values() if (lines := speeds(s, ours, torch))}
    if not found:
        return False
    plt = _pyplot()
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    size = (3.4 * columns, 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, dpi=110, layout="constrained", squeeze=False)
    for each, (name, lines) in zip(axes.flat, found.items(), strict=False):
        batches = sorted({batch for points in lines.values() for batch, _ in points})
        for line, color, style in LINES:
            if line in lines:
                known = dict(lines[line])  # no line leads over a batch that wasn't measured
                speed = [known.get(batch, math.nan) for batch in batches]
                each.plot(batches, speed, style, color=color, markersize=5, label=line)
        each.set(xscale="log", yscale="log", title=name, xlabel="sequences", ylabel="tokens/s")
        _mark(each, lines)
    for each in axes.flat[len(found) :]:
        each.axis("off")
    drawn = {line.get_label(): line for each in axes.flat for line in each.get_lines()}
    axes.flat[0].legend(drawn.values(), drawn.keys(), fontsize=8)  # not every picture has every line
    figure.suptitle(ours.source(), fontsize=8)
    figure.savefig(folder / BATCH)
    plt.close(figure)
    return True


def _mark(axes: Any, lines: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Ticks at every x of the lines and at round numbers of y, and a grid."""
    points = [point for line in lines.values() for point in line]
    places, ticks = sorted({x for x, _ in points}), _round_numbers([y for _, y in points])
    axes.set_xticks(places, map(str, places))
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _round_numbers(values: Sequence[float]) -> list[int]:
    """1, 2 and 5 times powers of ten, from the last one at most the least value to the first one at least the most."""
    steps = [digit * 10**power for power in range(8) for digit in (1, 2, 5)]
    first = max(bisect.bisect_right(steps, min(values)) - 1, 0)
    return steps[first : bisect.bisect_left(steps, max(values)) + 1]


def draw_parts(folder: Path) -> bool:
    """Writes the picture of a step's parts; False if there is nothing to draw."""
    path = folder / "step_parts.jsonl"
    rows = report.of_one_device(report.read_jsonl(path)) if path.is_file() else []
    found = bars(rows, Results.read("decode", folder))
    if not found:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.42 * len(found)), dpi=110, layout="constrained")
    for i, bar in enumerate(found):
        left = 0.0
        for part, time in bar.parts.items():
            axes.barh(i, time, left=left, color=COLORS.get(part, "lightgray"), height=0.7)
            left += time
        if bar.whole is not None:
            axes.plot(bar.whole, i, "k|", markersize=14)
    shown = [part for part in PARTS if any(part in bar.parts for bar in found)]
    for part in shown:
        axes.barh(0, 0, color=COLORS.get(part, "lightgray"), label=part)
    axes.plot([], [], "k|", markersize=10, label="whole step")
    axes.set_yticks(range(len(found)), [bar.label for bar in found], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    axes.set_title(f"{rows[0]['device']}, jax {rows[0]['jax']}", fontsize=8)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(folder / STEP)
    plt.close(figure)
    return True


def costs(rows: Sequence[dict[str, Any]], text: str) -> dict[str, list[tuple[int, float]]]:
    """(heads kept, increase of perplexity in percent) of each of `STAGES` on a text, masked, the router choosing."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        alike = row.get("what") == "router" and row.get("protocol") == "masked" and row.get("windows") == 96
        for label, stage in STAGES.items() if alike and row["text"] == text else ():
            if re.match(stage, row["stage"]):
                found.setdefault(label, {})[row["kept"]] = 100 * row["increase"]
    return {label: sorted(found[label].items()) for label in STAGES if label in found}


def draw_quality(folder: Path) -> bool:
    """Writes the picture of what skipping heads of SmolLM2-135M costs; False if there is nothing to draw."""
    path = folder / "quality.jsonl"
    rows = [row for row in report.read_jsonl(path) if "widened" in row["model"]] if path.is_file() else []
    found = {name: lines for text, name in TEXTS.items() if (lines := costs(rows, text))}
    if not found:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(found), figsize=(8, 3.4), dpi=110, layout="constrained", squeeze=False)
    for each, (name, lines) in zip(axes.flat, found.items(), strict=True):
        for label, points in lines.items():
            each.plot(*zip(*points, strict=True), "o-", markersize=5, label=label)
        each.set(yscale="log", title=name, xlabel="heads kept of 9", ylabel="increase of perplexity, %")
        _mark(each, lines)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(folder / QUALITY)
    plt.close(figure)
    return True


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for name, draw in ((BATCH, draw_batches), (STEP, draw_parts), (QUALITY, draw_quality)):
        print(f"{name}: {'drawn' if draw(RESULTS) else 'not measured'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
