"""Reads files of tuned tiles and finds the entry for a call.

A file is JSON: {"format": 1, "entries": [{op, device, dtype, shapes, tiles, time_us, jax, commit}, ...]}, where `shapes`
and `tiles` map names to positive integers. The files in this folder ship with the package; the file named by the
environment variable PALLAS_KERNELS_TUNED overrides them. Each process reads the files once.
"""

import functools
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FORMAT = 1
SHIPPED = Path(__file__).parent
VARIABLE = "PALLAS_KERNELS_TUNED"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The fastest tiles measured for one call.

    Attributes:
      op, device, dtype, shapes: the call; see `key`.
      tiles: the configuration.
      time_us: how long a call took, in microseconds.
      jax, commit: the versions of JAX and of this package that were measured.
    """

    op: str
    device: str
    dtype: str
    shapes: Mapping[str, int]
    tiles: Mapping[str, int]
    time_us: float
    jax: str
    commit: str

    def __post_init__(self) -> None:
        for name in ("op", "device", "dtype", "jax", "commit"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be a non-empty string; got {getattr(self, name)!r}")
        for name in ("shapes", "tiles"):
            sizes = getattr(self, name)
            good = isinstance(sizes, Mapping) and sizes
            if not good or not all(type(size) is int and size > 0 for size in sizes.values()):
                raise ValueError(f"{name} must map names to positive integers; got {sizes!r}")
        time = self.time_us
        if type(time) not in (int, float) or not 0 < time < math.inf:
            raise ValueError(f"time_us must be a positive number; got {time!r}")

    @property
    def key(self) -> tuple[str, str, str, tuple[tuple[str, int], ...]]:
        """The key of the calls that use these tiles."""
        return key(self.op, self.device, self.dtype, self.shapes)


def key(
    op: str, device: str, dtype: str, shapes: Mapping[str, int]
) -> tuple[str, str, str, tuple[tuple[str, int], ...]]:
    """Identifies a call: two calls with equal keys use the same tiles."""
    return op, device, dtype, tuple(sorted(shapes.items()))


def load(path: Path) -> tuple[Entry, ...]:
    """The entries of a file; raises a one-line ValueError if the file is unreadable or invalid."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"tuned tiles: {path} can't be read; got {type(error).__name__}: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"tuned tiles: {path} has another format; expected an object with format {FORMAT}")
    entries = document.get("entries")
    if not isinstance(entries, list):
        raise ValueError(f"tuned tiles: {path} has no list of entries; got {type(entries).__name__}")
    names = {field.name for field in fields(Entry)}
    found: dict[object, Entry] = {}
    for i, values in enumerate(entries):
        where = f"tuned tiles: {path}: entry {i}"
        if not isinstance(values, dict) or set(values) != names:
            got = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"{where}: wrong names; got {got}, expected {sorted(names)}")
        try:
            entry = Entry(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if entry.key in found:
            raise ValueError(f"{where}: repeats an earlier entry; got {entry.key}")
        found[entry.key] = entry
    return tuple(found.values())


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Adds `entries` to a file, replacing those for the same calls; the file is written completely or not at all."""
    before = load(path) if path.exists() else ()
    merged = {entry.key: asdict(entry) for entry in (*before, *entries)}
    text = json.dumps({"format": FORMAT, "entries": list(merged.values())}, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def lookup(op: str, device: str, dtype: str, shapes: Mapping[str, int]) -> Entry | None:
    """The entry for exactly this call on exactly this device, or None if there is none."""
    return _known(os.environ.get(VARIABLE)).get(key(op, device, dtype, shapes))


@functools.cache
def _known(more: str | None) -> dict[object, Entry]:
    files = [*sorted(SHIPPED.glob("*.json")), *([Path(more)] if more else [])]
    return {entry.key: entry for path in files for entry in load(path)}
