"""Reads named arrays that `polarjax.storage.arrays` wrote, each process only the bytes of its devices.

Large files are checked block by block as they are read: nothing is read twice. Values go from the file straight into the
memory that a CPU device keeps, or from which another device copies them.
"""

import contextlib
import dataclasses
import errno
import itertools
import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from polarjax.errors import CheckpointError, ran_out, read_hint
from polarjax.storage.chunks import Box, Chunk, chunks, whole
from polarjax.storage.record import (
    BLOCK,
    Record,
    changed,
    check_sizes,
    checked_as_read,
    crc32,
    crc32_of,
    verify,
)
from polarjax.types import Array, DTypeLike

READ_BYTES = 1 << 29  # arrays are read ahead up to this many bytes, or a single one
PIECE_BYTES = 1 << 23  # what one thread reads at a time
_THREADS = 8
_LARGE = 1 << 20  # smaller arrays share pages


def read_arrays(
    folder: Path,
    record: Record,
    *,
    dtype: DTypeLike | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    hint: str,
) -> dict[str, Array]:
    """Reads the arrays of a record, or of each the parts on this process's devices, checking that nothing has changed.

    The host holds at most `READ_BYTES` of them at a time, or one array, unless its memory is where they go.

    Args:
      folder: the orbax checkpoint.
      record: what `ArrayWriter.close` returned.
      dtype: dtype to convert to; None keeps the stored one.
      shardings: where each array goes; None puts all on the default device.
      hint: the error's hint if files are damaged.

    Raises:
      CheckpointError: a file is missing or has changed, or the record does not match.
    """
    stored = StoredArrays(folder, record, hint=hint)
    device = jax.device_put(0).sharding  # respects jax.default_device
    found: dict[str, Array] = {}
    waiting: deque[_Reading] = deque()
    with _errors(folder, hint), _pool() as pool:
        for name, entry in record["arrays"].items():
            kept = jax.dtypes.canonicalize_dtype(entry["dtype"] if dtype is None else dtype)
            reading = _Reading(name, tuple(entry["shape"]), kept, shardings[name] if shardings else device)
            while waiting and reading.num_bytes + sum(each.num_bytes for each in waiting) > READ_BYTES:
                done = waiting.popleft()
                found[done.name] = done.finish()
                del done  # and with it the memory, if the device has a copy
            reading.start(stored, pool)
            waiting.append(reading)
        while waiting:
            done = waiting.popleft()
            found[done.name] = done.finish()
    return found


class StoredArrays:
    """The arrays of an orbax checkpoint.

    Args:
      folder: the checkpoint.
      record: what `ArrayWriter.close` returned.
      hint: the errors' hint.

    Raises:
      CheckpointError: a file is missing or has another size, one that isn't checked as it is read has changed, or the
        record does not match.
    """

    def __init__(self, folder: Path, record: Record, *, hint: str):
        self._folder, self._hint = folder, hint
        self._arrays, self._files = record["arrays"], record["files"]
        with _errors(folder, hint):
            check_sizes(folder, record, hint=hint)
            large = checked_as_read(record)
            verify(folder, record, self._files.keys() - large, hint=hint)
            self._chunks = chunks(folder, self._arrays, hint=hint)
            read = {chunk.file for several in self._chunks.values() for chunk in several if chunk.file}
            if unknown := sorted(read - self._files.keys()):
                what = "the record of the arrays leaves out files that hold them"
                raise CheckpointError(what, where=folder, got=", ".join(unknown[:10]), hint=hint)
            verify(folder, record, large - read, hint=hint)
        self._local = threading.local()

    def read(self, name: str) -> np.ndarray:
        """One array, on the host.

        Raises:
          CheckpointError: it cannot be read, or its bytes have changed.
        """
        shape, dtype = tuple(self._arrays[name]["shape"]), np.dtype(self._arrays[name]["dtype"])
        array = _empty(shape, dtype)
        with _errors(self._folder, self._hint), _pool() as pool:
            for each in [pool.submit(task) for task in self.tasks(name, {whole(shape): array})]:
                each.result()
        return array

    def tasks(self, name: str, parts: Mapping[Box, np.ndarray]) -> Iterator[Callable[[], None]]:
        """Calls, in any order or at once, that fill parts of an array, which are zero and may have another dtype.

        A run of rows that several parts share is read once.
        """
        dtype = np.dtype(self._arrays[name]["dtype"])
        parts = {box: part.reshape(part.shape or 1) for box, part in parts.items()}
        for chunk in self._chunks[name]:
            inside = {box: part for box, part in parts.items() if _overlap(chunk.box, box)}
            edges = {edge for box in inside for edge in _common(chunk.box[0], box[0])}
            for rows in itertools.pairwise(sorted(edges)):
                used = {box: part for box, part in inside.items() if _common(rows, box[0]) == rows}
                if used:
                    yield from self._rows(chunk, rows, dtype, used)

    def _rows(
        self, chunk: Chunk, rows: tuple[int, int], dtype: np.dtype, parts: Mapping[Box, np.ndarray]
    ) -> Iterator[Callable[[], None]]:
        """Calls that fill parts with some rows (indices of the first axis) of a chunk that all of them need."""
        size = math.prod(chunk.shape[1:]) * dtype.itemsize  # of a row
        ((box, part), *others) = parts.items()
        as_stored = part.dtype == dtype and box[1:] == whole(chunk.shape)[1:] == chunk.box[1:]
        if chunk.file and as_stored and not others:
            start = chunk.offset + (rows[0] - chunk.box[0][0]) * size
            target = part[rows[0] - box[0][0] : rows[1] - box[0][0]].reshape(-1).view(np.uint8)
            edges = [
                start,
                *range((start // PIECE_BYTES + 1) * PIECE_BYTES, start + target.size, PIECE_BYTES),
            ]
            for i, end in itertools.pairwise([*edges, start + target.size]):
                yield lambda i=i, end=end: self._read(chunk.file, i, target[i - start : end - start])
            return
        count = max(PIECE_BYTES // size, 1)
        for first in range(rows[0], rows[1], count):
            some = (first, min(first + count, rows[1]))
            yield lambda some=some: self._copy(chunk, some, dtype, parts)

    def _copy(
        self, chunk: Chunk, rows: tuple[int, int], dtype: np.dtype, parts: Mapping[Box, np.ndarray]
    ) -> None:
        """Reads rows of a chunk and copies to each part what it has of them."""
        shape = (rows[1] - rows[0], *chunk.shape[1:])
        size, first = math.prod(shape) * dtype.itemsize, rows[0] - chunk.box[0][0]
        start = first * math.prod(shape[1:]) * dtype.itemsize
        if chunk.file:
            memory = self._memory(size)
            self._read(chunk.file, chunk.offset + start, memory)
        else:
            memory = np.frombuffer(chunk.content, np.uint8)[start : start + size]
        values = memory.view(dtype).reshape(shape)
        corner = (rows, *chunk.box[1:])
        for box, part in parts.items():
            both = [_common(one, two) for one, two in zip(corner, box, strict=True)]
            cut = lambda base, both=both: tuple(
                slice(i - base[axis][0], end - base[axis][0]) for axis, (i, end) in enumerate(both)
            )
            with np.errstate(all="ignore"):  # a value may be too large for the dtype
                part[cut(box)] = values[cut(corner)]

    def _memory(self, size: int) -> np.ndarray:
        """Memory of this thread, uint8 [size]; the next call returns the same."""
        if getattr(self._local, "memory", np.empty(0)).size < size:
            self._local.memory = _empty((size,), np.dtype(np.uint8))
        return self._local.memory[:size]

    def _read(self, name: str, start: int, target: np.ndarray) -> None:
        """Fills `target`, uint8 [n], from a file; raises `CheckpointError` if a block that it touches has changed."""
        entry = self._files[name]
        checked, end = "crc32" in entry, start + target.size
        with open(self._folder / name, "rb", buffering=0) as file:
            if not checked:
                self._fill(file.fileno(), name, start, target)
                return
            for block in range(start // BLOCK, -(-end // BLOCK)):
                first, last = block * BLOCK, min((block + 1) * BLOCK, entry["bytes"])
                inside = start <= first and last <= end
                memory = target[first - start : last - start] if inside else np.empty(last - first, np.uint8)
                self._fill(file.fileno(), name, first, memory)
                if crc32(memory) != crc32_of(entry, block):
                    raise changed(self._folder, [name], self._hint)
                if not inside:
                    i, j = max(start, first), min(end, last)
                    target[i - start : j - start] = memory[i - first : j - first]

    def _fill(self, descriptor: int, name: str, start: int, memory: np.ndarray) -> None:
        done = 0
        while done < memory.size:
            count = os.preadv(descriptor, [memory[done:]], start + done)
            if not count:
                raise changed(self._folder, [name], self._hint)  # shorter than a moment ago
            done += count


@dataclasses.dataclass
class _Reading:
    """One array on its way to its devices."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: jax.sharding.Sharding
    parts: dict[Box, np.ndarray] = dataclasses.field(default_factory=dict)
    futures: list[Future[None]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        places = self.sharding.addressable_devices_indices_map(self.shape)
        self._boxes = {device: _box(index, self.shape) for device, index in places.items()}
        values = sum(math.prod(end - start for start, end in box) for box in set(self._boxes.values()))
        self.num_bytes = values * self.dtype.itemsize

    def start(self, stored: StoredArrays, pool: ThreadPoolExecutor) -> None:
        """Has the threads fill the parts of this process's devices."""
        for box in self._boxes.values():
            if box not in self.parts:
                sizes = tuple(end - start for start, end in box)
                self.parts[box] = _empty(sizes if self.shape else (), self.dtype)
        self.futures = [pool.submit(task) for task in stored.tasks(self.name, self.parts)]

    def finish(self) -> Array:
        """Waits, and places the parts; on a CPU, devices keep the very memory that was filled."""
        for each in self.futures:
            each.result()
        kind = self.sharding.memory_kind
        places = [jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for device in self._boxes]
        placed = jax.device_put([self.parts[box] for box in self._boxes.values()], places)
        make = jax.make_array_from_single_device_arrays
        return jax.block_until_ready(make(self.shape, self.sharding, placed, dtype=self.dtype))


def _box(index: Sequence[slice] | None, shape: tuple[int, ...]) -> Box:
    assert index is not None
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True)) or whole(shape)


def _common(one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], two[0]), min(one[1], two[1])


def _overlap(one: Box, two: Box) -> bool:
    return all(first < end for first, end in map(_common, one, two))


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros; large ones in memory of their own, aligned as devices need it.

    Such memory goes back to the system at once, which `malloc` does with less and less of it, and has huge pages: most
    of the time of reading a cached file into new memory is for its pages.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that drop what they have not begun, if the block raises."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _errors(folder: Path, hint: str) -> Iterator[None]:
    """Turns errors of the system and of devices in the block into a `CheckpointError`."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        says: dict[str, Any] = {"where": folder, "got": str(getattr(error, "strerror", error))[:200] or None}
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            says["hint"] = (
                "free some memory, or use a machine with more; polarjax inspect shows the arrays' size"
            )
            raise CheckpointError("the machine has too little memory for the arrays", **says) from error
        if ran_out(error):
            says["hint"] = "use a larger device, or JAX_PLATFORMS=cpu; polarjax inspect shows their size"
            raise CheckpointError("the device has too little memory for the arrays", **says) from error
        if isinstance(error, OSError):
            says["hint"] = read_hint(error, hint)
            raise CheckpointError("the arrays cannot be read", **says) from error
        raise
