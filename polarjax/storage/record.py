"""The record of an orbax checkpoint: shape and dtype of every array, size and checksum of every file.

Orbax doesn't checksum uncompressed arrays, so the record keeps a checksum of every file.
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
    """Size and checksum of each file. Files in `known`, keyed by `identity`, are not hashed again."""
    known = known or {}
    of = lambda name: known.get(identity(folder / name)) or digest((folder / name).open("rb"))
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(of, names), strict=True))


def digest(stream: BufferedReader) -> dict[str, Any]:
    """Size and checksum of an open file; closes it."""
    with stream as file:
        size = os.fstat(file.fileno()).st_size
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def identity(path: Path) -> tuple[int, ...]:
    """Identifies an unchanged file, whatever its name."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def files(folder: Path) -> list[str]:
    """Relative paths of all files under a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_record(record: Any, *, where: Path, hint: str) -> None:
    """Raises `CheckpointError` unless a record read from a file is well-formed."""
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
    """Raises `CheckpointError` unless every file matches the record."""
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
