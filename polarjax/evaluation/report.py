"""The result of a sweep: as JSON with everything needed to repeat it, and as tables for people."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from polarjax.evaluation.estimates import Estimate, finite
from polarjax.selection.plans import SparsityPlan

CONVENTION = (
    "Windows are cut from all texts in one stream of tokens, one every `stride` tokens; a short tail is dropped. "
    "Each window starts without history, with BOS (`bos`) before its text if that is not null; BOS, the first token "
    "of a window without one, and the first `context` tokens are not scored. Where windows overlap, each token is "
    "scored once, in the first window that has it."
)
ERRORS = (
    "Standard errors take windows as the independent units, because the tokens of a window depend on each other: "
    "s = sqrt(n / (n - 1) * sum((sum_i - mean * count_i)^2)) / sum(count_i) over n windows. Those under "
    "`against_dense` are of the paired difference on the same windows. Neighboring windows of one document still "
    "depend on each other a little. null: a single window has none."
)
PROTOCOLS = {
    "masked": "The selection is a mask at every position, the first included; neurons are chosen for each token.",
    "decode": "What generate does at this batch size: the first `context` tokens of each window are read dense, then "
    "every token by a decoding step of `batch_size` windows, with neurons chosen once for the batch. Windows of a "
    "batch are far apart in the text.",
}

type Columns = Literal["perplexity", "agreement"]


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One selector at one density by one protocol.

    Attributes:
      selector: its name.
      density: fraction of the groups asked for.
      protocol: "masked" or "decode".
      batch_size: windows decoded together; None if masked.
      plan: groups and neurons kept in each layer.
      kept: fraction of "groups" and "neurons" kept over all layers.
      sparse: perplexities of the sparse model (`estimates.perplexities`).
      against_dense: paired differences (`estimates.differences`).
      kl: KL(dense ‖ sparse) in nats per token.
      top1: fraction of tokens where both predict the same next token.
      greedy: how long greedy texts stay equal (`parting.parting`), if measured.
    """

    selector: str
    density: float
    protocol: str
    batch_size: int | None
    plan: SparsityPlan
    kept: Mapping[str, float]
    sparse: Mapping[str, Any]
    against_dense: Mapping[str, Any]
    kl: Estimate
    top1: Estimate
    greedy: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """Selector, protocol and batch size."""
        batch = "" if self.batch_size is None else f" at batch {self.batch_size}"
        return f"{self.selector}, {self.protocol}{batch}"


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What a sweep measured, and of what.

    Attributes:
      model: path (if given), fingerprints of weights and routers, shape, dtype.
      text: the evaluated texts (if given), window, stride, context, BOS, and how much is scored.
      settings: densities, selectors, protocols, batch sizes, neurons, seed, and what they mean.
      dense: the dense model by protocol and batch size.
      rows: each selector, density, protocol and batch size.
      notes: what was left out, and why.
      versions: of the software, and the device.
      seconds: time it took, compilation included.
    """

    model: Mapping[str, Any]
    text: Mapping[str, Any]
    settings: Mapping[str, Any]
    dense: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]
    notes: Sequence[str]
    versions: Mapping[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON has; null for what is not finite."""
        explained = {"convention": CONVENTION, "standard_errors": ERRORS, "protocols": PROTOCOLS}
        return _plain(
            {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            | {"explained": explained}
        )

    def table(self, columns: Columns = "perplexity") -> str:
        """The measurements as text; `columns` are those of perplexity or of agreement."""
        dense = [_dense_line(each) for each in self.dense] if columns == "perplexity" else []
        rows = [_cells(row, columns) for row in self.rows]
        lines = [*dense, *([aligned(_HEADERS[columns], rows)] if rows else [])]
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])


_ROW = ("selector", "density", "heads", "neurons", "protocol", "batch")
_HEADERS = {
    "perplexity": (
        *_ROW,
        "perplexity",
        "increase",
        "per word",
        "bits/byte",
    ),
    "agreement": (
        *_ROW,
        "KL, nats",
        "same next token",
        "equal greedy tokens",
    ),
}


def _cells(row: Row, columns: Columns) -> list[str]:
    kept = [f"{row.density:.3g}", f"{row.kept['groups']:.0%}", f"{row.kept['neurons']:.0%}"]
    first = [row.selector, *kept, row.protocol, str(row.batch_size or "")]
    if columns == "agreement":
        return [*first, str(row.kl), _percent(row.top1), "" if row.greedy is None else _greedy(row.greedy)]
    perplexity = row.sparse["perplexity"]
    return [
        *first,
        str(perplexity["token"]),
        _percent(row.against_dense["increase"]["token"], signed=True),
        str(perplexity.get("word", "")),
        str(row.sparse.get("bits_per_byte", "")),
    ]


def _percent(share: Estimate, *, signed: bool = False) -> str:
    return f"{share.value:{'+' if signed else ''}.1%} ± {share.standard_error:.1%}"


def _greedy(found: Mapping[str, Any]) -> str:
    return (
        f"median {found['median']:g}, mean {found['mean'].value:.1f}, "
        f"{found['censored']} of {found['prompts']} all {found['most']}"
    )


def _dense_line(dense: Mapping[str, Any]) -> str:
    batch = "" if dense["batch_size"] is None else f", batch {dense['batch_size']}"
    perplexity = dense["perplexity"]
    words = f", {perplexity['word']} per word" if "word" in perplexity else ""
    bits = f", {dense['bits_per_byte']} bits/byte" if "bits_per_byte" in dense else ""
    return f"dense ({dense['protocol']}{batch}): perplexity {perplexity['token']}{words}{bits}"


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with right-aligned columns."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return finite(value)
    return value
