"""Folders and files on disk that appear complete or not at all, and JSON files.

A folder or file is made next to its final place, as `.NAME.polarjax-tmp-TOKEN`. During the rename, what it replaces is
kept with `.old` after that name. The process holding the `.lock` file owns all three paths; the system releases the lock
when the process dies, and the next process that writes to the same place removes what is left.
"""

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from polarjax.errors import CheckpointError, InputError, read_hint

_MARK = ".polarjax-tmp-"
_LOCK, _OLD = ".lock", ".old"

type MayReplace = Callable[[Path], bool]


@contextlib.contextmanager
def atomic_folder(
    path: Path,
    *,
    overwrite: bool = False,
    may_replace: MayReplace | None = None,
    num_bytes: int = 0,
    obsolete: Path | None = None,
) -> Iterator[Path]:
    """Yields a temporary sibling folder, renamed to `path` at the end of the block, or removed if the block raises.

    Flushes its files to disk before the rename. First removes temporary folders that killed processes left beside
    `path`; those of running processes are left alone.

    Args:
      path: the folder to make; missing parents are made too.
      overwrite: whether an existing `path` may be replaced.
      may_replace: says whether the existing `path` may be replaced; called only with `overwrite`.
      num_bytes: minimum size of the files, if known; that much disk space must be free.
      obsolete: a file that the new folder makes invalid; removed just before the folder appears.

    Raises:
      CheckpointError: `path` exists and must not be replaced, writing fails, the disk has too little room, or a file
        read in the block can't be read.
    """
    path = absolute(path)
    _check_name(path)
    with system_errors(path):
        remove_stale(path)
        check_free(path, overwrite, may_replace)
        _check_room(path, num_bytes)
        with _claimed(path) as temporary:
            temporary.mkdir()
            yield temporary
            _flush(temporary)
            check_free(path, overwrite, may_replace)  # something may have appeared meanwhile
            if obsolete is not None:
                obsolete.unlink(missing_ok=True)
            _put(temporary, path)


@contextlib.contextmanager
def atomic_file(path: Path, *, overwrite: bool = False) -> Iterator[TextIO]:
    """Yields a text stream whose content appears at `path` at the end of the block, or not at all if it raises.

    Raises:
      CheckpointError: `path` exists and must not be replaced, is a directory, a device or a pipe, writing fails, or a
        file read in the block can't be read.
    """
    path = absolute(path)
    with system_errors(path):
        # A link such as /dev/stdout stays, whatever is behind it.
        stream = path.is_symlink() and os.readlink(path).startswith("/proc/")
        if stream or (path.exists() and not (path.is_dir() or path.is_file())):
            raise CheckpointError("not a file that can be replaced", where=path, hint="choose another name")
        remove_stale(path)
        check_free(path, overwrite, None)
        if path.is_dir():
            hint = "choose another name for the file"
            raise CheckpointError("a directory is in the way", where=path, hint=hint)
        with _claimed(path) as temporary:
            with open(temporary, "x", encoding="utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            check_free(path, overwrite, None)
            temporary.replace(path)
            _sync(path.parent)


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yields a new, empty folder in the system's folder for temporary files (TMPDIR); it is removed at the end.

    Those that killed processes left under the same `name` are removed first; those of running processes stay.

    Raises:
      OSError: the folder can't be made.
    """
    path = Path(tempfile.gettempdir(), name)
    path.parent.stat()  # a missing TMPDIR is an error; it is not made
    remove_stale(path)
    with _claimed(path) as temporary:
        temporary.mkdir(mode=0o700)
        yield temporary


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps `path`, whose folder exists, for this process during the block.

    Raises:
      CheckpointError: another process has it.
    """
    with contextlib.ExitStack() as stack:
        with system_errors(path):
            mine = stack.enter_context(_locked(path.with_name(f".{path.name}{_MARK}run")))
        if not mine:
            hint = "wait until it has ended, or write elsewhere"
            raise CheckpointError("another process is writing this", where=path, hint=hint)
        yield


def absolute(path: str | os.PathLike[str]) -> Path:
    """The absolute `path`, with `~` expanded and without `..`; symbolic links are kept.

    Raises `InputError` on what is no path.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise InputError(
            "not a path",
            where="path",
            got=repr(path)[:80],
            expected="a str or a pathlib.Path",
            hint="name a folder",
        )
    return Path(os.path.abspath(Path(path).expanduser()))


def check_writable(folder: Path) -> None:
    """Raises `CheckpointError` unless files can be made in a folder; for use before long work that ends there."""
    folder = absolute(folder)
    with system_errors(folder), _claimed(folder / "probe"):
        pass


def remove_stale(path: Path) -> None:
    """Removes what killed processes left beside `path`; restores `path` if one was killed while replacing it."""
    found = path.parent.glob(f".{glob.escape(path.name)}{_MARK}*")
    for name in {each.name.removesuffix(_LOCK).removesuffix(_OLD) for each in found}:
        temporary = path.with_name(name)
        with contextlib.suppress(OSError), _locked(temporary) as mine:
            if mine:
                _clear(temporary, path)


def write_json(file: Path, data: dict[str, Any]) -> None:
    """Writes an object as JSON and flushes it to disk."""
    with open(file, "w", encoding="utf-8") as stream:
        dump_json(stream, data)
        stream.flush()
        os.fsync(stream.fileno())


def dump_json(stream: TextIO, data: dict[str, Any]) -> None:
    """Writes an object as indented JSON."""
    json.dump(data, stream, indent=2)
    stream.write("\n")


def read_json(file: Path, *, hint: str) -> dict[str, Any]:
    """The object in a JSON file; raises `CheckpointError` if there is none."""
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("the file is missing", where=file, hint=hint) from error
    except OSError as error:
        fix = read_hint(error, hint)
        raise CheckpointError("the file can't be read", where=file, got=error.strerror, hint=fix) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not readable as JSON", where=file, got=str(error), hint=hint) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=file, got=type(data).__name__, hint=hint)
    return data


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a system error in a block that only reads into a `CheckpointError` that names the file, or else `path`."""
    try:
        yield
    except OSError as error:
        got, hint = error.strerror or str(error), read_hint(error, "check that it exists and is readable")
        where = error.filename or path
        raise CheckpointError("this can't be read", where=where, got=got, hint=hint) from error


def _beside(temporary: Path, suffix: str) -> Path:
    return temporary.with_name(temporary.name + suffix)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """Yields a sibling name that no other process uses; removes what is left under it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        temporary = path.with_name(f".{path.name}{_MARK}{secrets.token_hex(4)}")
        with _locked(temporary) as mine:
            if not mine:  # another process is removing it as stale
                continue
            try:
                yield temporary
            finally:
                _clear(temporary, path)
            return


@contextlib.contextmanager
def _locked(temporary: Path) -> Iterator[bool]:
    """Locks a temporary name; yields False if another process has it."""
    file = _beside(temporary, _LOCK)
    handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    mine = False
    try:
        mine = _lock(handle, file)
        yield mine
    finally:
        if mine:
            file.unlink(missing_ok=True)
        os.close(handle)


def _lock(handle: int, file: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except (BlockingIOError, FileNotFoundError):  # another process has it, or has just removed it
        return False


def _clear(temporary: Path, path: Path) -> None:
    """Removes unfinished output; restores the replaced version unless the new one is in place."""
    old = _beside(temporary, _OLD)
    if os.path.lexists(old) and not os.path.lexists(path):
        old.rename(path)
    for each in (temporary, old):
        _remove(each)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_name(path: Path) -> None:
    """Raises `CheckpointError` for a name that is not UTF-8, which some libraries can't write to."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        where = os.fsencode(path).decode(errors="backslashreplace")
        raise CheckpointError("the name is not UTF-8", where=where, hint="choose another name") from error


def check_free(path: Path, overwrite: bool, may_replace: MayReplace | None) -> None:
    """Raises `CheckpointError` if something is at `path` that may not be replaced; for use before long work too."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        hint = "choose another name, or pass overwrite (--overwrite)"
        raise CheckpointError("the output already exists", where=path, hint=hint)
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if not empty and may_replace is not None and not may_replace(path):
        raise CheckpointError(
            "overwriting is refused: this was not written by polarjax",
            where=path,
            hint="choose another folder",
        )


def _check_room(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(next(each for each in path.parents if each.exists())).free
    if free < num_bytes:
        got, expected = f"{free / 1e9:,.2f} GB", f"at least {num_bytes / 1e9:,.2f} GB"
        hint = "make room, or choose a folder on another disk"
        raise CheckpointError(
            "the disk has too little room", where=path, got=got, expected=expected, hint=hint
        )


def _flush(folder: Path) -> None:
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
    """Renames `temporary` to `path`; moves the old version aside first (`_clear` removes or restores it)."""
    if os.path.lexists(path):
        path.rename(_beside(temporary, _OLD))
    temporary.rename(path)
    _sync(path.parent)


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turns a system error into a `CheckpointError` that names `path`, or the other file that the error is about."""
    try:
        yield
    except BrokenPipeError:  # from a stream unrelated to `path`
        raise
    except OSError as error:
        got, named = error.strerror or str(error), error.filename
        if isinstance(named, str) and not _within(Path(named), path):
            hint = "check that it exists and that you may read it"
            raise CheckpointError("cannot read or write this", where=named, got=got, hint=hint) from error
        hint = "make room, or choose a writable folder"
        raise CheckpointError("cannot write here", where=path, got=got, hint=hint) from error


def _within(file: Path, path: Path) -> bool:
    """Whether a file is `path`, one of its parents, in it, or its temporary version."""
    file = absolute(file)
    ours = str(path.with_name(f".{path.name}{_MARK}"))
    return path.is_relative_to(file) or file.is_relative_to(path) or str(file).startswith(ours)
