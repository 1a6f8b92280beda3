"""Reading parts of large files one after another, each while the caller works on the one before.

Weights are read once, so they go past the system's page cache where that is possible: there each of their bytes costs
a page that is found, filled and given back, which took more of the processor than everything else about reading.
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

PART_BYTES = 1 << 24
"""A good size of a part."""

_BUFFERS = 3  # one with the caller, one being filled, one waiting for the disk
_SMALL = 1 << 20  # less is read in the ordinary way
_PAGE = 4096  # what direct access aligns to: a multiple of any disk's blocks
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux alone has it


class Part(NamedTuple):
    """Consecutive bytes of a file."""

    file: Path
    offset: int
    size: int


def read_ahead(parts: Sequence[Part]) -> Generator[np.ndarray, None, None]:
    """The bytes of each part, uint8 [size], or fewer where the file ends; valid until the next is asked for.

    Raises:
      OSError: a file cannot be read.
    """
    size = max((part.size for part in parts), default=0)
    buffers = [_pages(size + 2 * _PAGE) for _ in range(min(_BUFFERS, len(parts)))]
    pool = ThreadPoolExecutor(1)
    pending: deque[Future[np.ndarray]] = deque()
    try:
        for part, buffer in zip(parts, itertools.cycle(buffers)):
            pending.append(pool.submit(_read, part, buffer))
            if len(pending) == len(buffers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pages(size: int) -> np.ndarray:
    """Memory that begins where a page does, uint8 [size]."""
    memory = np.empty(size + _PAGE, np.uint8)
    return memory[-memory.ctypes.data % _PAGE :][:size]


def _read(part: Part, buffer: np.ndarray) -> np.ndarray:
    """Reads a part; within the buffer it begins as far from a page's start as within the file."""
    memory = buffer[part.offset % _PAGE :][: part.size]
    done = 0
    with open(part.file, "rb", buffering=0) as stream:
        if part.size >= _SMALL and _DIRECT and not _in_page_cache(stream, part.offset + part.size // 2):
            done = _read_direct(part, buffer)
        while done < part.size and (
            got := os.preadv(stream.fileno(), [memory[done:].data], part.offset + done)
        ):
            done += got
    return memory[:done]


def _read_direct(part: Part, buffer: np.ndarray) -> int:
    """Reads what direct access gives of a part, in whole pages; 0 where the file system refuses."""
    skip = part.offset % _PAGE
    pages = buffer[: -(-(skip + part.size) // _PAGE) * _PAGE]
    try:
        handle = os.open(part.file, os.O_RDONLY | _DIRECT)
        try:
            return max(0, min(os.preadv(handle, [pages.data], part.offset - skip) - skip, part.size))
        finally:
            os.close(handle)
    except OSError:
        return 0  # the ordinary way follows, and tells what is wrong


def _in_page_cache(stream: FileIO, offset: int) -> bool:
    """Whether the system holds a byte of a file in memory; True where it cannot tell."""
    try:
        return os.preadv(stream.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # of file systems and platforms
        return True
