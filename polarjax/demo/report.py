"""The demo's results as text: tables, dense and sparse continuations side by side, and a summary."""

from collections.abc import Sequence
from typing import Any

from polarjax.evaluation.report import aligned

NOTICEABLE = 0.2
"""Selections are compared at the first density where random selection raises perplexity by this fraction."""

_WIDTH = 50


def text(results: dict[str, Any]) -> str:
    """The text that the demo prints at the end."""
    parts = (
        _generation(results["generation"]),
        _quality(results["quality"]),
        _plans(results["plans"], results["costs"]),
        _pace(results),
        "Summary\n" + "\n".join(f"- {line}" for line in reading(results)),
    )
    return "\n\n".join(parts)


def reading(results: dict[str, Any]) -> list[str]:
    """A summary in sentences."""
    quality, plans = results["quality"], results["plans"]
    lines = []
    found = compared(quality)
    if found is None:
        lines.append(
            "Random selection costs little at every density of the table, so there is nothing to compare."
        )
    else:
        density, rise = found
        lines.append(f"Perplexity at head density {density:g}, every position masked: {_changes(rise)}.")
        lines.append(
            f"The routers avoid {1 - rise['router'] / rise['random']:.0%} of what random selection costs."
        )
        other = next(row for row in quality["important_rows"] if row["density"] == density)
        lines.append(
            f"With layer {quality['important_layer']} dense instead of layer 0, and predicted norms: "
            f"{_changes(_rise(other, quality['dense']))}."
        )
    lines += [
        f"After healing, the router costs {row['router'] / quality['dense'] - 1:+.1%} at {row['density']:g}."
        for row in quality["healed"]["rows"]
        if row["density"] == 0.5
    ]
    same = results["generation"]["density_1_equals_dense"]
    lines.append(
        f"Density 1.0 generates {'the same tokens as' if same else 'OTHER tokens than'} the dense model."
    )
    if plans:
        worst = min(min(row["recall"]) for row in plans)
        first, last = plans[0], plans[-1]
        lines.append(
            f"The plan keeps {_mean(first['density']):.0%} of the neurons at batch {first['batch_size']} and "
            f"{_mean(last['density']):.0%} at batch {last['batch_size']}; the lowest recall of truly active "
            f"neurons in any layer, on text that nothing was learned from, is {worst:.3f}."
        )
    return lines


def compared(quality: dict[str, Any]) -> tuple[float, dict[str, float]] | None:
    """The highest density at which random selection raises perplexity noticeably, and every selection's rise."""
    for row in quality["rows"]:
        rise = _rise(row, quality["dense"])
        if rise["random"] >= NOTICEABLE:
            return row["density"], rise
    return None


def _rise(row: dict[str, float], dense: float) -> dict[str, float]:
    return {name: value / dense - 1 for name, value in row.items() if name != "density"}


def _changes(rise: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:+.1%}" for name, value in rise.items())


def _generation(generation: dict[str, Any]) -> str:
    lines = ["Dense and sparse continuations (greedy)"]
    rows = zip(generation["prompts"], generation["dense"], generation["sparse"], strict=True)
    for prompt, dense, sparse in rows:
        lines += ["", f"  prompt {prompt!r}"]
        pairs = zip(_cut(dense), _cut(sparse), strict=True)
        lines += [f"    {left:<{_WIDTH}} | {right}" for left, right in pairs if left or right]
    return "\n".join(lines)


def _cut(text: str) -> list[str]:
    """The first three lines of a text's `repr`."""
    shown = repr(text)[1:-1]
    return [shown[i * _WIDTH : (i + 1) * _WIDTH] for i in range(3)]


def _quality(quality: dict[str, Any]) -> str:
    title = (
        f"Perplexity of {quality['tokens']:,} held-out tokens by head density, all heads kept in layer 0; "
        f"dense {quality['dense']:.2f}"
    )
    other = (
        f"The same with all heads kept in layer {quality['important_layer']} instead, whose attention turns the "
        "residual stream the most,\nand one router for all densities that predicts norms "
        "(--published --dense-attention important --head-objective importance)"
    )
    return "\n".join(
        (
            title,
            _rises(quality["rows"], quality["dense"]),
            "",
            other,
            _rises(quality["important_rows"], quality["dense"]),
            "",
            "The same layer dense, after healing (polarjax tune --train out, 40 million tokens), which changed the "
            f"dense model to {quality['healed']['dense']:.2f};\nincreases over the dense model before",
            _rises(quality["healed"]["rows"], quality["dense"]),
        )
    )


def _rises(rows: list[dict[str, float]], dense: float) -> str:
    names = [name for name in rows[0] if name != "density"]
    cells = [
        [
            f"{row['density']:g}",
            *(f"{row[name]:.2f} ({row[name] / dense - 1:+.1%})" for name in names),
        ]
        for row in rows
    ]
    return aligned(["density", *names], cells)


def _plans(plans: list[dict[str, Any]], costs: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(plan["batch_size"]),
            f"{_mean(plan['density']):.0%}",
            f"{min(plan['recall']):.3f}",
            f"{cost['dense'] / 1e3:,.0f} kB",
            f"{cost['sparse'] / 1e3:,.0f} kB",
            f"{cost['sparse'] / cost['dense']:.2f}",
        ]
        for plan, cost in zip(plans, costs, strict=True)
    ]
    header = ["batch", "neurons kept", "lowest recall", "bytes/token dense", "sparse", "ratio"]
    title = "The plan by batch size, and the bytes a decoding step must touch (bfloat16, full cache)"
    return f"{title}\n{aligned(header, rows)}"


def _pace(results: dict[str, Any]) -> str:
    pace, settings = results["generation"]["tokens_per_second"], results["settings"]
    return (
        f"Measured here ({settings['device']}, {len(results['generation']['prompts'])} sequences, float32, "
        f"second run): {pace['dense']:.0f} tokens/s dense, {pace['sparse']:.0f} sparse. "
        "A model this small is limited by overhead, not by memory traffic."
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
