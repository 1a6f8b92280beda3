"""Reads ranges of large files in order, each while the caller processes the previous one.

Weights are read once, so reads bypass the page cache where possible: managing its pages took more CPU time than the
rest of reading.
"""

import itertools
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

RANGE_BYTES = 1 << 24
"""A good size of a range."""

_BUFFERS = 3  # one with the caller, one being filled, one waiting for the disk
_SMALL = 1 << 20  # smaller ranges are read through the page cache
_PAGE = 4096  # alignment of direct I/O: a multiple of any disk's block size
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


class FileRange(NamedTuple):
    """Consecutive bytes of a file."""

    file: Path
    offset: int
    size: int


def read_ahead(ranges: Sequence[FileRange]) -> Generator[np.ndarray, None, None]:
    """Yields the bytes of each range, uint8 [size], fewer at the end of the file; valid until the next one is read.

    Raises:
      OSError: a file cannot be read.
    """
    size = max((span.size for span in ranges), default=0)
    buffers = [_pages(size + 2 * _PAGE) for _ in range(min(_BUFFERS, len(ranges)))]
    pool = ThreadPoolExecutor(1)
    pending: deque[Future[np.ndarray]] = deque()
    try:
        for span, buffer in zip(ranges, itertools.cycle(buffers)):
            pending.append(pool.submit(_read, span, buffer))
            if len(pending) == len(buffers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pages(size: int) -> np.ndarray:
    """Page-aligned memory, uint8 [size]."""
    memory = np.empty(size + _PAGE, np.uint8)
    return memory[-memory.ctypes.data % _PAGE :][:size]


def _read(span: FileRange, buffer: np.ndarray) -> np.ndarray:
    """Reads a range; its offset within a page is the same in the buffer as in the file."""
    memory = buffer[span.offset % _PAGE :][: span.size]
    done = 0
    with open(span.file, "rb", buffering=0) as stream:
        if span.size >= _SMALL and _DIRECT and not _in_page_cache(stream, span.offset + span.size // 2):
            done = _read_direct(span, buffer)
        while done < span.size and (
            got := os.preadv(stream.fileno(), [memory[done:].data], span.offset + done)
        ):
            done += got
    return memory[:done]


def _read_direct(span: FileRange, buffer: np.ndarray) -> int:
    """Reads a range with direct I/O, in whole pages; returns the bytes read, 0 if the file system refuses."""
    skip = span.offset % _PAGE
    pages = buffer[: -(-(skip + span.size) // _PAGE) * _PAGE]
    try:
        handle = os.open(span.file, os.O_RDONLY | _DIRECT)
        try:
            return max(0, min(os.preadv(handle, [pages.data], span.offset - skip) - skip, span.size))
        finally:
            os.close(handle)
    except OSError:
        return 0  # the caller's normal read reports the error


def _in_page_cache(stream: FileIO, offset: int) -> bool:
    """Whether the byte at `offset` is in the page cache; True if unknown."""
    try:
        return os.preadv(stream.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # unsupported by the file system or platform
        return True
