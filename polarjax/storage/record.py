"""The record of an orbax checkpoint: shape and dtype of every array, size and checksums of every file.

Orbax doesn't checksum uncompressed arrays, so the record does: a small file has one SHA-256, a large one a CRC-32 for
each of its blocks, so that a process which reads part of it can check that part. (Earlier versions recorded the SHA-256
of large files too.)
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.errors import CheckpointError

type Record = dict[str, Any]
# {"arrays": {name: {"shape", "dtype"}}, "files": {path: {"bytes", "sha256"} or {"bytes", "crc32"}}}

BLOCK = 1 << 18  # bytes for each CRC-32; another size would be another format
LARGE = 1 << 20  # files from this size on have CRC-32s
_DIGITS = 8  # hexadecimal, of a CRC-32
_THREADS = 8


def digests(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file."""
    return _each(names, lambda name: digest((folder / name).open("rb")))


def digest(stream: BufferedReader) -> dict[str, Any]:
    """Size and SHA-256 of an open file; closes it."""
    with stream as file:
        size = os.fstat(file.fileno()).st_size
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checksums(
    folder: Path, names: list[str], *, known: Mapping[tuple[int, ...], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What a record says about each file. Those in `known`, keyed by `identity`, are not read again."""
    return _each(
        names, lambda name: known.get(identity(folder / name)) or checksum((folder / name).open("rb"))
    )


def checksum(stream: BufferedReader) -> dict[str, Any]:
    """What a record says about an open file; closes it."""
    size = os.fstat(stream.fileno()).st_size
    if size < LARGE:
        return digest(stream)
    memory, sums = memoryview(bytearray(BLOCK)), []
    with stream as file:
        while count := file.readinto(memory):
            sums.append(crc32(memory[:count]))
    return {"bytes": size, "crc32": "".join(sums)}


def crc32(block: memoryview | np.ndarray) -> str:
    """The CRC-32 of one block, as a record writes it."""
    return f"{zlib.crc32(block):0{_DIGITS}x}"


def crc32_of(entry: Mapping[str, Any], block: int) -> str:
    """The recorded CRC-32 of block number `block` of a file."""
    return entry["crc32"][block * _DIGITS : (block + 1) * _DIGITS]


def _each(names: list[str], of: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(of, names), strict=True))


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
        fine = fine and all(map(_has_checksums, files))
    except (KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise CheckpointError("the record of the arrays is damaged", where=where, hint=hint)


def _has_checksums(entry: Mapping[str, Any]) -> bool:
    if "crc32" not in entry:
        return isinstance(entry["sha256"], str)
    return isinstance(entry["crc32"], str) and len(entry["crc32"]) == _DIGITS * -(-entry["bytes"] // BLOCK)


def check_sizes(folder: Path, record: Record, *, hint: str) -> None:
    """Raises `CheckpointError` unless every file is there and has its size."""
    expected = record["files"]
    missing = sorted(name for name in expected if not (folder / name).is_file())
    if missing:
        raise CheckpointError("files are missing", where=folder, got=", ".join(missing[:10]), hint=hint)
    cut = [name for name in expected if (folder / name).stat().st_size != expected[name]["bytes"]]
    if cut:
        raise changed(folder, cut, hint)


def verify(folder: Path, record: Record, names: Iterable[str], *, hint: str) -> None:
    """Raises `CheckpointError` unless these files match the record."""
    expected = record["files"]
    of = lambda name: (digest if "sha256" in expected[name] else checksum)((folder / name).open("rb"))
    found = _each(sorted(names), of)
    damaged = [name for name in found if found[name] != expected[name]]
    if damaged:
        raise changed(folder, damaged, hint)


def checked_as_read(record: Record) -> set[str]:
    """The files whose every block has a checksum."""
    return {name for name, entry in record["files"].items() if "crc32" in entry}


def changed(folder: Path, names: Sequence[str], hint: str) -> CheckpointError:
    """The error for files that don't match the record."""
    return CheckpointError(
        "files have changed since they were written",
        where=folder,
        got=", ".join(sorted(names)[:10]),
        hint=hint,
    )
