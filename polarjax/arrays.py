"""Named arrays on disk: an orbax checkpoint written piece by piece, with a record that catches damage.

Orbax's current format has no checksum over uncompressed array data, so the record keeps one for every file.
"""

import contextlib
import glob
import hashlib
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from polarjax.errors import CheckpointError
from polarjax.memory import ran_out
from polarjax.quiet import quiet_threads
from polarjax.types import Array, DTypeLike

type Record = dict[str, Any]  # {"arrays": {name: {"shape", "dtype"}}, "files": {path: {"bytes", "sha256"}}}

BATCH_BYTES = 3 << 26  # small arrays are written together, up to this many bytes
CHUNK_BYTES = 1 << 26  # the unit in which a shard of a large array can be read back
_THREADS = 8
_ROOM = "make room, or choose a folder that can be written"
_OPEN = 64  # files that may wait for their hash, held open: a process may not hold many
_STILL = 1.0  # seconds without a change after which a folder counts as left alone
_LARGE = 1 << 20  # smaller files are hashed at the end: some are written again by then


class ArrayWriter:
    """Writes named arrays one after another, holding little more than the two largest in memory.

    While a batch is gathered, the one before is written and the files of the one before that are hashed, each by a
    thread of its own. Memory for the arrays can be had here (`reserve`): two blocks, used in turns, because a system
    hands out fresh memory more slowly than it copies.

    To be used in a `with` block: threads may be writing when an exception ends the work.

    Args:
      folder: where the orbax checkpoint will be; must not exist.
      batch_bytes: arrays are gathered up to this size before they are written.
    """

    def __init__(self, folder: Path, *, batch_bytes: int = BATCH_BYTES):
        self._folder = folder
        self._limit = batch_bytes
        self._batch: dict[str, np.ndarray] = {}
        self._blocks: list[np.ndarray] = []
        self._arrays: dict[str, dict[str, Any]] = {}
        self._digests: dict[tuple[int, ...], Future[dict[str, Any]]] = {}
        self._opened = contextlib.ExitStack()
        self._writer, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1, initializer=_give_way)
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

        What is held is written out first if `size` more bytes would exceed the batch. Without an `add` the next call
        gives the same memory.
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
        return {"arrays": self._arrays, "files": _digests(self._folder, _files(self._folder), known=known)}

    def stop(self) -> None:
        """Lets what is being written come to an end; nothing more is written."""
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
            self._blocks.reverse()  # the other block was written
            self._written = self._writer.submit(self._save, batch)

    def _wait(self) -> None:
        """Waits for the batch before; raises what its writing raised."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def _save(self, batch: dict[str, np.ndarray]) -> None:
        with self._writing() as path, _context():
            ocp.partial.save(path, batch)
        batch.clear()
        wait(list(self._digests.values())[:-_OPEN])
        for file in self._folder.parent.glob(f"{glob.escape(self._folder.name)}*/**/*"):
            if file.is_file() and file.stat().st_size >= _LARGE and _identity(file) not in self._digests:
                # Opened now: it may have another name by then.
                stream = self._opened.enter_context(open(file, "rb"))  # noqa: SIM115
                self._digests[_identity(file)] = self._hasher.submit(_digest, stream)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[str]:
        with (
            _orbax("cannot write the arrays", self._folder, _ROOM),
            quiet_threads(),
            _settled(self._folder.parent),
            _plain(self._folder) as path,
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
    mend: str,
) -> dict[str, Array]:
    """Reads back everything that a record names, after checking that no file changed.

    Args:
      folder: the orbax checkpoint.
      record: what `ArrayWriter.close` returned.
      dtype: to convert to; None keeps the stored one.
      shardings: where each array goes; None puts all on the default device.
      mend: told to the reader when files are damaged.

    Raises:
      CheckpointError: a file is missing or has changed, or the record does not fit.
    """
    verify(folder, record, mend=mend)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(
            tuple(entry["shape"]),
            np.dtype(entry["dtype"] if dtype is None else dtype),
            sharding=device if shardings is None else shardings[name],
        )
        for name, entry in record["arrays"].items()
    }
    with _orbax("the arrays cannot be read", folder, mend), _plain(folder) as path:
        return ocp.load(path, targets)


def read_array(folder: Path, name: str, record: Record, *, mend: str) -> np.ndarray:
    """Reads back one array alone, on the host where JAX has a CPU backend; the files are not checked (`verify`).

    Raises:
      CheckpointError: it cannot be read.
    """
    entry = record["arrays"][name]
    sharding = jax.sharding.SingleDeviceSharding(_host())
    target = jax.ShapeDtypeStruct(tuple(entry["shape"]), np.dtype(entry["dtype"]), sharding=sharding)
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    with _orbax("the array cannot be read", folder, mend), _plain(folder) as path, context:
        return np.asarray(ocp.load(path, {name: target})[name])


def _give_way() -> None:
    """Lets other threads go before the calling one, where threads have priorities of their own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(15, os.getpriority(os.PRIO_PROCESS, thread)))


def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was started without its CPU backend
        return jax.local_devices()[0]


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array_options.saving.use_compression = False
    context.array_options.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory_options.deepcopy_host_arrays = False
    return context


@contextlib.contextmanager
def _orbax(what: str, folder: Path, mend: str | None = None) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        detail = next(iter(str(error).splitlines()), "")[:200]
        if ran_out(error):
            what, mend = (
                "the device has too little memory for the arrays",
                "see polarjax inspect for their size",
            )
        raise CheckpointError(what, where=folder, got=detail, mend=mend) from error


@contextlib.contextmanager
def _settled(folder: Path) -> Iterator[None]:
    """After an error, waits until nothing in `folder` changes any more.

    When one file fails, TensorStore goes on with the others of the batch, out of reach: it would fill the folder again
    while, or after, it is removed.
    """
    try:
        yield
    except BaseException:
        seen, since = None, time.monotonic()
        while time.monotonic() - since < _STILL:
            if (found := _sizes(folder)) != seen:
                seen, since = found, time.monotonic()
            time.sleep(_STILL / 50)
        raise


def _sizes(folder: Path) -> dict[str, int]:
    """What lies in `folder` at the moment, and of which size; files may come and go meanwhile."""
    sizes = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                sizes[os.path.join(root, name)] = os.lstat(os.path.join(root, name)).st_size
    return sizes


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[str]:
    """`folder` by a name that can be given to orbax, for which paths are glob patterns, and to TensorStore, for which a
    backslash parts folders.
    """
    if not set("*?[\\") & set(str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, "link")
        link.symlink_to(folder.parent, target_is_directory=True)
        yield str(link / folder.name)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digests(
    folder: Path, names: list[str], *, known: Mapping[tuple[int, ...], dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file; of those already known, by identity, they are not taken again."""
    known = known or {}
    digest = lambda name: known.get(_identity(folder / name)) or _digest((folder / name).open("rb"))
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _digest(stream: BufferedReader) -> dict[str, Any]:
    """Of a file, which is closed."""
    with stream as file:
        size = os.fstat(file.fileno()).st_size
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _identity(path: Path) -> tuple[int, ...]:
    """The same file, unchanged, under whatever name."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_record(record: Any, *, where: Path, mend: str) -> None:
    """Raises `CheckpointError` unless a record, as it was read from a file, has the form of those made here."""
    try:
        arrays, files = record["arrays"].values(), record["files"].values()
        sizes = [n for entry in arrays for n in (np.dtype(entry["dtype"]).itemsize, *entry["shape"])]
        fine = all(type(n) is int for n in (*sizes, *(entry["bytes"] for entry in files)))
        fine = fine and all(isinstance(entry["sha256"], str) for entry in files)
    except (KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise CheckpointError("the record of the arrays is damaged", where=where, mend=mend)


def verify(folder: Path, record: Record, *, mend: str) -> None:
    """Raises `CheckpointError` unless every file is as it was when the record was made."""
    expected = record["files"]
    missing = sorted(name for name in expected if not (folder / name).is_file())
    if missing:
        raise CheckpointError("files are missing", where=folder, got=", ".join(missing[:10]), mend=mend)
    found = _digests(folder, sorted(expected))
    damaged = sorted(name for name in expected if found[name] != expected[name])
    if damaged:
        raise CheckpointError(
            "files have changed since they were written", where=folder, got=", ".join(damaged[:10]), mend=mend
        )
