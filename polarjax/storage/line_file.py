"""A file that is written line by line and can be continued: killed, a process leaves whole lines and at most a torn one.

Beside it, as `NAME.run`, is a JSON object that says what the lines were made from and with; whoever continues the file
must be about to write the same.
"""

import contextlib
import fcntl
import io
import json
import os
import select
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from polarjax.errors import CheckpointError
from polarjax.storage.atomic import absolute, atomic_file, dump_json, read_json, system_errors

_KIND, _FORMAT = "polarjax lines", 1
_MOST = 1 << 24  # bytes of a record
_START_OVER = "start over with --overwrite, or write to another --output"


class LineStream:
    """Standard output, or another stream that can't be continued; each line is there once `write` returns.

    Args:
      stream: unbuffered.
      name: its name in errors.
      closes: whether it is closed at the end.
    """

    hint = "make room, or write elsewhere"

    def __init__(self, stream: Any, name: object, *, closes: bool = True) -> None:
        self._stream, self._name, self._closes = stream, name, closes

    @classmethod
    def stdout(cls) -> Self:
        """Standard output."""
        try:
            sys.stdout.flush()
            stream: Any = io.FileIO(sys.stdout.fileno(), "w", closefd=False)
        except (OSError, ValueError):  # a stream of Python's own
            stream = sys.stdout.buffer
        return cls(stream, "standard output", closes=False)

    def write(self, line: str) -> None:
        """Writes a line.

        Raises:
          BrokenPipeError: nobody reads it any more.
          CheckpointError: writing fails; of a file, whole lines are left.
        """
        data = line.encode() + b"\n"
        try:
            self._put(memoryview(data))
        except BrokenPipeError:
            raise
        except OSError as error:
            self._undo()
            got = error.strerror
            raise CheckpointError("cannot write here", where=self._name, got=got, hint=self.hint) from error
        self._wrote(len(data))

    def _put(self, data: memoryview) -> None:
        while data:
            count = self._stream.write(data)
            if count is None:  # the stream doesn't block, and is full
                select.select([], [self._stream], [])
            data = data[count or 0 :]
        self._stream.flush()

    def _undo(self) -> None: ...

    def _wrote(self, count: int) -> None: ...

    def close(self) -> None:
        """Closes the stream, except standard output."""
        if self._closes:
            with contextlib.suppress(OSError):
                self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LineFile(LineStream):
    """A file of lines that only one process writes at a time.

    Args:
      path: the file; made with its folder if it isn't there.

    Raises:
      CheckpointError: it can't be written, or another process is writing it.
    """

    hint = "make room, and go on with --resume"

    def __init__(self, path: Path) -> None:
        with system_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        super().__init__(io.FileIO(handle, "r+"), path)
        self.path, self._size = path, 0
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            hint = "wait until it has ended, or write elsewhere"
            raise CheckpointError("another process is writing this", where=path, hint=hint) from error
        except OSError:  # a file system without locks
            pass

    def lines(self) -> Iterator[str]:
        """The whole lines that are there; once all have been read, what is torn is cut off.

        Raises:
          CheckpointError: a line isn't UTF-8.
        """
        self._size = 0
        with open(self.path, "rb") as reader:
            for number, line in enumerate(reader, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    yield line[:-1].decode()
                except UnicodeDecodeError as error:
                    where = f"{self.path}, line {number}"
                    raise CheckpointError(
                        "not UTF-8", where=where, got=str(error), hint=_START_OVER
                    ) from error
                self._size += len(line)
        self._undo()

    def begin(self, record: Mapping[str, Any]) -> None:
        """Removes all lines, and says what new ones come from; raises `CheckpointError`, and removes nothing, if that
        can't be written."""
        with atomic_file(record_path(self.path), overwrite=True) as stream:
            dump_json(stream, {_KIND: _FORMAT, **record})
            stream.flush()
            self._size = 0
            os.ftruncate(self._stream.fileno(), 0)

    def close(self) -> None:
        """Flushes the file to disk and closes it."""
        if not self._stream.closed:
            with contextlib.suppress(OSError):
                os.fsync(self._stream.fileno())
        super().close()

    def _undo(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._stream.fileno(), self._size)

    def _wrote(self, count: int) -> None:
        self._size += count


def is_stream(path: Path) -> bool:
    """Whether what is at a path is neither a file nor a folder, so that nothing in it could be continued."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def open_stream(path: Path) -> LineStream:
    """A pipe or device for lines; raises `CheckpointError` if it can't be written."""
    with system_errors(path):
        return LineStream(io.FileIO(path, "w"), path)


def target_of(path: Path) -> Path:
    """The file at the end of symbolic links."""
    return Path(os.path.realpath(absolute(path)))


def record_path(path: Path) -> Path:
    """Where the record of a file of lines is."""
    return path.with_name(f"{path.name}.run")


def is_record(path: Path) -> bool:
    """Whether a file was written by `LineFile.begin`."""
    try:
        return path.stat().st_size < _MOST and _KIND in json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def check_record(path: Path, record: Mapping[str, Any], *, may_be_unknown: Collection[str]) -> None:
    """Raises `CheckpointError`, naming the first difference, unless a file of lines was begun with this record.

    `may_be_unknown` are names of values that are None where they aren't known, which matches everything.
    """
    where = record_path(path)
    if not where.is_file():
        hint = f"nothing says what made {path.name}: {_START_OVER}"
        raise CheckpointError("the record of the output is missing", where=where, hint=hint)
    found, record = read_json(where, hint=_START_OVER), {_KIND: _FORMAT, **record}
    for name in dict.fromkeys([*record, *found]):
        ours, theirs = record.get(name), found.get(name)
        unknown = name in may_be_unknown and None in (ours, theirs)
        if ours != theirs and not unknown:
            raise CheckpointError(
                f"the output was begun with another value of {name}",
                where=path,
                got=_shown(theirs),
                expected=_shown(ours),
                hint=f"resume with what it was begun with (see {where.name}), or {_START_OVER}",
            )


def _shown(value: Any) -> str:
    return str(value)[:80]
