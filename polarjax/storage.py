"""Folders on disk that appear whole or not at all, and JSON files in them."""

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from polarjax.errors import CheckpointError

_MARK = ".polarjax-tmp-"
_LOCK = ".lock"


@contextlib.contextmanager
def atomic_folder(
    path: Path,
    *,
    overwrite: bool = False,
    may_replace: Callable[[Path], bool] | None = None,
    num_bytes: int = 0,
) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `path` when the block ends, and is removed if it raises.

    Its files are flushed to the disk before the rename. Temporary folders that an earlier, killed process left
    beside `path` are removed first; those of a process still running are left alone.

    Args:
      path: the folder to make; its parents are made too.
      overwrite: whether an existing `path` may be replaced.
      may_replace: whether what exists at `path` is of the kind that may be replaced; asked only with `overwrite`.
      num_bytes: that the files will have at least, if known; the disk must have room for so many.

    Raises:
      CheckpointError: `path` exists and must not be replaced, or the disk refuses or has too little room.
    """
    path = absolute(path)
    _check_free(path, overwrite, may_replace)
    try:
        remove_stale(path)
        _check_room(path, num_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(path)
        temporary.mkdir()
    except OSError as error:
        raise _refused(path, error) from error
    try:
        with _locked(temporary):
            yield temporary
            _flush(temporary)
            _put(temporary, path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path, *, overwrite: bool = False) -> Iterator[TextIO]:
    """Yields a text stream whose content is at `path` once the block ends; nothing is there if it raises.

    Raises:
      CheckpointError: `path` exists and must not be replaced, is a directory, or the disk refuses.
    """
    path = absolute(path)
    _check_free(path, overwrite, None)
    if path.is_dir():
        raise CheckpointError(
            "a directory is in the way", where=path, mend="choose another name for the file"
        )
    temporary = _sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` expanded, relative to nothing, without `..`; symbolic links are kept."""
    return Path(os.path.abspath(Path(path).expanduser()))


def remove_stale(path: Path) -> None:
    """Removes the temporary folders that killed processes left beside `path`."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}{_MARK}*"):
        with contextlib.suppress(BlockingIOError), _locked(folder):
            shutil.rmtree(folder)


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Writes an object as JSON, down to the disk."""
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_json(file: Path, *, mend: str) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointError` when there is none."""
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("the file is missing", where=file, mend=mend) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("not readable as JSON", where=file, got=str(error), mend=mend) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=file, got=type(data).__name__, mend=mend)
    return data


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}{_MARK}{secrets.token_hex(4)}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases when the process dies."""
    handle = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _check_free(path: Path, overwrite: bool, may_replace: Callable[[Path], bool] | None) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        mend = "choose another folder, or pass overwrite (--overwrite)"
        raise CheckpointError("the output already exists", where=path, mend=mend)
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if not empty and may_replace is not None and not may_replace(path):
        raise CheckpointError(
            "overwriting is refused: this was not written by polarjax",
            where=path,
            mend="choose another folder",
        )


def _check_room(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(next(each for each in path.parents if each.exists())).free
    if free < num_bytes:
        got, expected = f"{free / 1e9:,.2f} GB", f"at least {num_bytes / 1e9:,.2f} GB"
        mend = "make room, or choose a folder on another disk"
        raise CheckpointError(
            "the disk has too little room", where=path, got=got, expected=expected, mend=mend
        )


def _flush(folder: Path) -> None:
    (folder / _LOCK).unlink()
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`; what was there is moved aside first and removed afterwards."""
    if os.path.lexists(path):
        old = _sibling(path)
        path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            old.rename(path)
            raise
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    else:
        temporary.rename(path)
    _sync(path.parent)


def _refused(path: Path, error: OSError) -> CheckpointError:
    mend = "make room, or choose a folder that can be written"
    return CheckpointError("cannot write here", where=path, got=error.strerror or str(error), mend=mend)
