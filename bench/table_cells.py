"""What the README's speed tables are made of: rows of a results file, and cells that say what is in them."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import report

MISSING = "not measured"
OTHERS = ("dense", "take+dot", "xla", "cudnn", "pooling only")  # kernels that are not ours
TIMES = ("time_us", "ms_per_step", "seconds", "first_token_ms")

Row = dict[str, Any]


class Results:
    """Rows of one results file by case and kernel.

    If rows come from several devices, only the device with the most rows counts; if a case was measured more than once,
    only its last commit. `alone`: kinds are measured in processes of their own, so the last commit of each counts.
    """

    def __init__(self, rows: Iterable[Row], *, alone: bool = False) -> None:
        timed = [row for row in rows if any(column in row for column in TIMES)]
        cases: dict[str, list[Row]] = {}
        for row in report.of_one_device(timed):
            model, _, rest = row["case"].partition(" ")
            for name in dict.fromkeys((model, *row.get("same", ()))):
                cases.setdefault(f"{name} {rest}", []).append(row)
        self.cases = {case: _last(found, alone=alone) for case, found in cases.items()}
        self.used: list[Row] = []

    @classmethod
    def read(cls, name: str, folder: Path, *, alone: bool = False) -> "Results":
        path = folder / f"{name}.jsonl"
        return cls(report.read_jsonl(path) if path.is_file() else (), alone=alone)

    def get(self, case: str, kernel: str | None) -> Row | None:
        """The row of a kernel. None means ours with the heuristic's tiles: the first row not in `OTHERS`."""
        for row in self.cases.get(case, ()):
            name = row.get("kernel", row.get("kind"))
            if name == kernel or (kernel is None and name not in OTHERS):
                self.used.append(row)
                return row
        return None

    def source(self) -> str:
        """Device, versions, commits and copy bandwidths of the rows used so far."""
        return source_of(self.used)


def _last(rows: list[Row], *, alone: bool) -> list[Row]:
    """Those of the last commit; with `alone`, of each kind's last commit."""
    commits = {row["kind"] if alone else None: row.get("commit") for row in rows}
    return [row for row in rows if row.get("commit") == commits[row["kind"] if alone else None]]


def source_of(rows: Sequence[Row]) -> str:
    """Device, versions, commits and copy bandwidths of rows."""
    if not rows:
        return f"{MISSING} on a GPU"
    device = _several(row["device"] for row in rows)
    commit = _several(row["commit"][:7] for row in rows)
    made = _several(f"{name} {row[name]}" for row in rows for name in ("jax", "torch") if name in row)
    copies = sorted(row["copy_gbps"] for row in rows if "copy_gbps" in row)
    reads = sorted(row["read_gbps"] for row in rows if "read_gbps" in row)
    speeds = "".join(
        f", {name} at {_range(of)} GB/s" for name, of in (("copies", copies), ("reading alone", reads)) if of
    )
    return f"{device}, {made}, commit {commit}{speeds}"


def _several(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


def _range(ordered: Sequence[float]) -> str:
    low, high = (f"{value:,.0f}" for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"


def number(row: Row | None, key: str, form: str) -> str:
    return MISSING if row is None or row.get(key) is None else form.format(row[key])


def ratio(slow: Row | None, fast: Row | None, key: str = "time_us") -> str:
    return MISSING if slow is None or fast is None else f"{slow[key] / fast[key]:.2f} ×"


def speedup(dense: Row | None, row: Row) -> str:
    """Speedup over the dense call of the same run if the row has it, else over `dense`."""
    measured = row.get("speedup_vs_dense")
    return ratio(dense, row) if measured is None else f"{measured:.2f} ×"


def section(title: str, note: str, source: str, table: str) -> str:
    """A heading, a paragraph that explains what the table shows and where it was measured, and the table."""
    paragraph = textwrap.fill(f"{note} ({source})", 120, break_long_words=False, break_on_hyphens=False)
    return f"#### {title}\n\n{paragraph}\n\n{table}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))
