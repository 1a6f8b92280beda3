"""Writes named arrays: an orbax checkpoint made in batches, with a record that detects damage.

`polarjax.storage.array_reader` reads them.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from polarjax.storage.orbax import orbax_errors, quiet_threads, saving_context, settled
from polarjax.storage.plain_path import plain_path
from polarjax.storage.record import LARGE, Record, checksum, checksums, files, identity

BATCH_BYTES = 3 << 26  # small arrays are written together, up to this many bytes
_ROOM = "make room, or choose a writable folder"
_OPEN = 64  # most files held open for hashing; the process limit may be low
_LARGE = LARGE  # smaller files are hashed at the end, because orbax rewrites some


class ArrayWriter:
    """Writes named arrays in order, holding little more than the two largest in memory.

    Three stages overlap: one batch is gathered while the previous one is written by one thread and the files of the one
    before are hashed by another. `reserve` gives memory for arrays from two alternating blocks, because allocating
    fresh memory is slower than copying.

    Use it in a `with` block, which stops the threads after an exception.

    Args:
      folder: the orbax checkpoint to make; must not exist.
      batch_bytes: bytes of arrays to gather before writing.
    """

    def __init__(self, folder: Path, *, batch_bytes: int = BATCH_BYTES):
        self._folder = folder
        self._limit = batch_bytes
        self._batch: dict[str, np.ndarray] = {}
        self._blocks: list[np.ndarray] = []
        self._arrays: dict[str, dict[str, Any]] = {}
        self._checksums: dict[tuple[int, ...], Future[dict[str, Any]]] = {}
        self._opened = contextlib.ExitStack()
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """Shape and dtype of everything added so far, by name."""
        return self._arrays

    def reserve(self, size: int) -> np.ndarray:
        """Memory of `size` bytes in which the next array can be made, uint8 [size].

        Writes the current batch first if `size` more bytes would exceed its limit. Until `add` is called, the next call
        returns the same memory.
        """
        self._make_room(size)
        if size > self._limit:
            return np.empty(size, np.uint8)
        if not self._blocks:
            self._blocks = [np.empty(self._limit, np.uint8) for _ in range(2)]
        held = self._held()
        return self._blocks[0][held : held + size]

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds an array; it must not be changed afterwards."""
        self._make_room(array.nbytes)
        self._batch[name] = array
        self._arrays[name] = {"shape": list(array.shape), "dtype": array.dtype.name}

    def close(self) -> Record:
        """Finishes the checkpoint and returns its record."""
        self._write()
        self._wait()
        with self._writing() as path:
            ocp.partial.finalize(path)
        known = {identity: sums.result() for identity, sums in self._checksums.items()}
        self.stop()
        return {"arrays": self._arrays, "files": checksums(self._folder, files(self._folder), known=known)}

    def stop(self) -> None:
        """Waits for the current write; cancels the rest."""
        self._writer.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)
        self._opened.close()

    def _held(self) -> int:
        return sum(array.nbytes for array in self._batch.values())

    def _make_room(self, size: int) -> None:
        if self._batch and self._held() + size > self._limit:
            self._write()

    def _write(self) -> None:
        batch, self._batch = self._batch, {}
        if batch:
            self._wait()
            self._blocks.reverse()  # the other block is free now
            self._written = self._writer.submit(self._save, batch)

    def _wait(self) -> None:
        """Waits for the previous batch; raises its error, if any."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def _save(self, batch: dict[str, np.ndarray]) -> None:
        with self._writing() as path, saving_context():
            ocp.partial.save(path, batch)  # pyrefly: ignore[bad-argument-type]
        batch.clear()
        wait(list(self._checksums.values())[:-_OPEN])
        for file in self._folder.parent.glob(f"{glob.escape(self._folder.name)}*/**/*"):
            if file.is_file() and file.stat().st_size >= _LARGE and identity(file) not in self._checksums:
                # Open it now: it may be renamed before it is hashed.
                stream = self._opened.enter_context(open(file, "rb"))  # noqa: SIM115
                self._checksums[identity(file)] = self._hasher.submit(checksum, stream)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[str]:
        with (
            orbax_errors("cannot write the arrays", self._folder, _ROOM),
            quiet_threads(),
            settled(self._folder.parent),
            plain_path(self._folder) as path,
        ):
            try:
                yield path
            except (ValueError, RuntimeError) as error:
                if refused := re.search(r"os_error_code='(\d+)'", str(error)):
                    raise OSError(int(refused[1]), os.strerror(int(refused[1]))) from error
                raise
