"""The picture of a sweep: perplexity by density; needs matplotlib (`polarjax[plot]`)."""

import importlib.util
from pathlib import Path
from typing import Any, BinaryIO

from polarjax.errors import InputError
from polarjax.evaluation.report import Report, Row

LOOKS = {
    "router": ("#0072B2", "o"),
    "oracle": ("#009E73", "s"),
    "random": ("#D55E00", "^"),
    "static": ("#CC79A7", "d"),
}  # colors that color-blind readers can tell apart (Okabe and Ito)
OTHERS = ("#56B4E9", "v")
LINES = ("-", "--", ":", "-.")
FORMATS = (".png", ".pdf", ".svg")


def picture_kind(path: Path) -> str:
    """The format of a picture by its name; raises `InputError` unless matplotlib is installed and can write it."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        expected = ", ".join(FORMATS)
        raise InputError(
            "no such kind of picture", where=path, expected=expected, hint="end the name with .png"
        )
    if importlib.util.find_spec("matplotlib") is None:
        hint = "pip install 'polarjax[plot]', or leave the picture out"
        raise InputError("a picture needs matplotlib, which is not installed", where=path, hint=hint)
    return kind


def draw(report: Report, stream: BinaryIO, kind: str) -> None:
    """Draws perplexity over the fraction of heads kept, a line for each selector and protocol, with error bars.

    Args:
      report: what a sweep measured.
      stream: where the picture goes.
      kind: one of `FORMATS`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    try:
        _fill(report, axes)
        figure.savefig(stream, dpi=150, format=kind.removeprefix("."))
    finally:
        pyplot.close(figure)


def _fill(report: Report, axes: Any) -> None:
    series: dict[str, list[Row]] = {}
    for row in report.rows:
        series.setdefault(row.label, []).append(row)
    modes = list(dict.fromkeys((row.protocol, row.batch_size) for row in report.rows))
    for label, rows in series.items():
        rows = sorted(rows, key=lambda row: row.density)
        color, marker = LOOKS.get(rows[0].selector, OTHERS)
        line = LINES[modes.index((rows[0].protocol, rows[0].batch_size)) % len(LINES)]
        values = [row.sparse["perplexity"]["token"] for row in rows]
        axes.errorbar(
            [row.kept["groups"] for row in rows],
            [each.value for each in values],
            [each.standard_error if each.standard_error == each.standard_error else 0 for each in values],
            color=color,
            marker=marker,
            linestyle=line,
            label=label,
            capsize=2,
        )
    for each in report.dense[:1]:
        axes.axhline(each["perplexity"]["token"].value, color="0.5", linewidth=1, label="dense")
    axes.set(
        yscale="log",
        xlabel="fraction of heads kept, all layers",
        ylabel="perplexity per token (log scale)",
        title=f"{report.text['scored_tokens']:,} tokens, bars: standard error",
    )
    axes.invert_xaxis()
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
