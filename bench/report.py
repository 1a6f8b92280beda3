"""Measured rows as a table for people, and as JSON lines with their device, versions and commit."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]


def provenance(**more: Any) -> dict[str, Any]:
    """Device, platform, JAX version, commit and `more`, to add to each row of a results file."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "commit": commit(),
        **more,
    }


def commit() -> str:
    """The commit that is measured: BENCH_COMMIT, or git's."""
    if known := os.environ.get("BENCH_COMMIT"):
        return known
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def cache_state() -> str:
    """Whether JAX keeps compiled programs on disk, and had some: "off", "empty" or "filled"."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return "off"
    return "filled" if os.path.isdir(folder) and os.listdir(folder) else "empty"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """`columns` of `rows` as aligned text, numbers to about three digits."""
    cells = [list(columns), *([_show(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]], head: Mapping[str, Any]) -> None:
    """Appends one line of JSON per row, each with the entries of `head`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**head, **row}) + "\n")


def measure(
    rows: Iterable[dict[str, Any]], head: Mapping[str, Any], name: str, columns: Sequence[str]
) -> None:
    """Prints each row as it comes and all of them as a table; keeps them in the file `name` if OUT is set."""
    path, found = results_path(name), []
    print(head, flush=True)
    for row in rows:
        found.append(row)
        print(row, flush=True)
        if path:
            append_jsonl(path, [row], head)
    print(table(found, columns))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def of_one_device(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the device with the most rows, because one table must not mix devices."""
    rows = list(rows)
    devices = Counter(row.get("device") for row in rows).most_common(1)
    return [row for row in rows if row.get("device") == devices[0][0]]


def results_path(default: str) -> Path | None:
    """Where to write JSON lines: in the folder given by the variable OUT; None if it is not set."""
    folder = os.environ.get("OUT")
    return Path(folder) / default if folder else None
