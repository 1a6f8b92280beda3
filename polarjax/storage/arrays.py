"""Named arrays on disk: an orbax checkpoint written in batches, with a record that detects damage.

Orbax doesn't checksum uncompressed arrays, so the record keeps a checksum of every file.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from polarjax.storage.orbax import orbax_errors, plain_path, quiet_threads, saving_context, settled
from polarjax.storage.record import Record, digest, digests, files, identity, verify
from polarjax.types import Array, DTypeLike

BATCH_BYTES = 3 << 26  # small arrays are written together, up to this many bytes
READ_BYTES = 1 << 30  # arrays are read together up to this many bytes, which pass through the host
_ROOM = "make room, or choose a writable folder"
_OPEN = 64  # most files held open for hashing; the process limit may be low
_LARGE = 1 << 20  # smaller files are hashed at the end, because orbax rewrites some


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
        self._digests: dict[tuple[int, ...], Future[dict[str, Any]]] = {}
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
        known = {identity: digest.result() for identity, digest in self._digests.items()}
        self.stop()
        return {"arrays": self._arrays, "files": digests(self._folder, files(self._folder), known=known)}

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
        wait(list(self._digests.values())[:-_OPEN])
        for file in self._folder.parent.glob(f"{glob.escape(self._folder.name)}*/**/*"):
            if file.is_file() and file.stat().st_size >= _LARGE and identity(file) not in self._digests:
                # Open it now: it may be renamed before it is hashed.
                stream = self._opened.enter_context(open(file, "rb"))  # noqa: SIM115
                self._digests[identity(file)] = self._hasher.submit(digest, stream)

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


def read_arrays(
    folder: Path,
    record: Record,
    *,
    dtype: DTypeLike | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    hint: str,
) -> dict[str, Array]:
    """Reads all arrays of a record, after checking that no file has changed.

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
    verify(folder, record, hint=hint)
    device = jax.device_put(0).sharding  # respects jax.default_device
    targets = {
        name: jax.ShapeDtypeStruct(
            tuple(entry["shape"]),
            np.dtype(entry["dtype"] if dtype is None else dtype),
            sharding=device if shardings is None else shardings[name],
        )
        for name, entry in record["arrays"].items()
    }
    found: dict[str, Array] = {}
    with (
        orbax_errors("the arrays cannot be read", folder, hint),
        plain_path(folder) as path,
        _parts_of_tree(),
    ):
        for names in _batches(
            {name: target.size * target.dtype.itemsize for name, target in targets.items()}
        ):
            found |= jax.block_until_ready(ocp.load(path, {name: targets[name] for name in names}))  # pyrefly: ignore[bad-argument-type]
    return {name: found[name] for name in targets}


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in order, in lists of arrays with at most `READ_BYTES` or of a single one."""
    names, held = [], 0
    for name, size in sizes.items():
        if names and held + size > READ_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def _parts_of_tree() -> ocp.Context:
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    return context


def read_array(folder: Path, name: str, record: Record, *, hint: str) -> np.ndarray:
    """Reads one array, onto the host if JAX has a CPU backend; doesn't check the files (see `verify`).

    Raises:
      CheckpointError: it cannot be read.
    """
    entry = record["arrays"][name]
    sharding = jax.sharding.SingleDeviceSharding(_host())
    target = jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]), sharding=sharding)
    with orbax_errors("the array cannot be read", folder, hint), plain_path(folder) as path, _parts_of_tree():
        return np.asarray(ocp.load(path, {name: target})[name])  # pyrefly: ignore[bad-argument-type, bad-index]


def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was started without its CPU backend
        return jax.local_devices()[0]
