"""Lines of bytes from a file or pipe as they come, of bounded length."""

import io
import lzma
import os
import select
import stat
import sys
from pathlib import Path

from polarjax.errors import InputError
from polarjax.text.corpus import unreadable

LONGEST_LINE = 1 << 24
"""Most bytes of a line."""

STDIN = Path("-")
_CHUNK = 1 << 16


class ByteLines:
    """The lines of a file, a pipe, or `-`, standard input, without their ends.

    A line that is longer than `LONGEST_LINE` is cut one byte after that. Files that end in `.xz` are decompressed.

    Attributes:
      regular: whether it is a file, whose lines never have to be waited for.
      ended: whether all lines have been taken.

    Raises:
      InputError: there is no such file, or it can't be read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._buffer, self._searched = path, bytearray(), 0
        self._read_all = self.ended = False
        self._stream = self._opened()
        self.regular = path != STDIN and path.parts[1:2] != ("dev",) and _is_regular(self._stream)

    def take(self, *, wait: bool) -> bytes | None:
        """The next line; None after the last one, or, unless `wait`, if it isn't there yet."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0 or (self._read_all and self._buffer):
                return self._cut(end if end >= 0 else len(self._buffer))
            if self._read_all:
                self.ended = True
                return None
            del self._buffer[LONGEST_LINE + 1 :]
            self._searched = len(self._buffer)
            if not wait and not self._ready(wait=False):
                return None
            self._fill()

    def _cut(self, end: int) -> bytes:
        line = bytes(self._buffer[: min(end, LONGEST_LINE + 1)])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def _ready(self, *, wait: bool) -> bool:
        if self.regular:
            return True
        waiting = select.poll()
        waiting.register(self._stream, select.POLLIN)
        return bool(waiting.poll(None if wait else 0))

    def _fill(self) -> None:
        try:
            chunk = self._stream.read(_CHUNK)
        except (lzma.LZMAError, EOFError) as error:
            hint = "copy the file again"
            raise InputError("damaged .xz file", where=str(self._path), got=str(error), hint=hint) from error
        except OSError as error:
            raise self._refusal(error.strerror) from error
        if chunk is None:  # the stream doesn't block, and nothing has come yet
            self._ready(wait=True)
            return
        self._buffer += chunk
        if not chunk:
            self._read_all = True
            self.close()

    def close(self) -> None:
        """Closes the file; lines that weren't taken are lost."""
        self._stream.close()

    def _opened(self) -> io.RawIOBase | lzma.LZMAFile:
        if self._path == STDIN:
            if sys.stdin is None:
                raise self._refusal("a closed file")
            return io.FileIO(os.dup(0))
        if (got := unreadable(self._path)) is not None:
            raise self._refusal(got)
        try:
            is_compressed = self._path.suffix.lower() == ".xz"
            return lzma.LZMAFile(self._path) if is_compressed else io.FileIO(self._path)
        except OSError as error:
            raise self._refusal(error.strerror) from error

    def _refusal(self, got: str | None) -> InputError:
        hint = "give a UTF-8 text or .jsonl file, or - for standard input"
        where = "standard input" if self._path == STDIN else str(self._path)
        return InputError("cannot read the prompts", where=where, got=got, hint=hint)


def _is_regular(stream: io.RawIOBase | lzma.LZMAFile) -> bool:
    return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
