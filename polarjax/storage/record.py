"""The record of an orbax checkpoint: shape and dtype of every array, size and checksum of every file.

Orbax's current format has no checksum over uncompressed array data, so the record keeps one for every file.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.errors import CheckpointError

type Record = dict[str, Any]  # {"arrays": {name: {"shape", "dtype"}}, "files": {path: {"bytes", "sha256"}}}


_THREADS = 8


def digests(
    folder: Path, names: list[str], *, known: Mapping[tuple[int, ...], dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file; of those already known, by identity, they are not taken again."""
    known = known or {}
    of = lambda name: known.get(identity(folder / name)) or digest((folder / name).open("rb"))
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(of, names), strict=True))


def digest(stream: BufferedReader) -> dict[str, Any]:
    """Of a file, which is closed."""
    with stream as file:
        size = os.fstat(file.fileno()).st_size
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def identity(path: Path) -> tuple[int, ...]:
    """The same file, unchanged, under whatever name."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def files(folder: Path) -> list[str]:
    """All files below a folder, by relative path, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_record(record: Any, *, where: Path, hint: str) -> None:
    """Raises `CheckpointError` unless a record, as it was read from a file, has the form of those made here."""
    try:
        arrays, files = record["arrays"].values(), record["files"].values()
        sizes = [n for entry in arrays for n in (np.dtype(entry["dtype"]).itemsize, *entry["shape"])]
        fine = all(type(n) is int for n in (*sizes, *(entry["bytes"] for entry in files)))
        fine = fine and all(isinstance(entry["sha256"], str) for entry in files)
    except (KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise CheckpointError("the record of the arrays is damaged", where=where, hint=hint)


def verify(folder: Path, record: Record, *, hint: str) -> None:
    """Raises `CheckpointError` unless every file is as it was when the record was made."""
    expected = record["files"]
    missing = sorted(name for name in expected if not (folder / name).is_file())
    if missing:
        raise CheckpointError("files are missing", where=folder, got=", ".join(missing[:10]), hint=hint)
    found = digests(folder, sorted(expected))
    damaged = sorted(name for name in expected if found[name] != expected[name])
    if damaged:
        raise CheckpointError(
            "files have changed since they were written", where=folder, got=", ".join(damaged[:10]), hint=hint
        )
