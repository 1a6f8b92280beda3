"""Named arrays on disk: an orbax checkpoint written piece by piece, with a record that catches damage.

Orbax's current format has no checksum over uncompressed array data, so the record keeps one for every file.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from polarjax.errors import CheckpointError
from polarjax.types import Array, DTypeLike

type Record = dict[str, Any]  # {"arrays": {name: {"shape", "dtype"}}, "files": {path: {"bytes", "sha256"}}}

BATCH_BYTES = 1 << 26  # small arrays are written together, up to this many bytes
CHUNK_BYTES = 1 << 26  # the unit in which a shard of a large array can be read back
_THREADS = 8


class ArrayWriter:
    """Writes named arrays one after another, holding little more than the largest in memory.

    Args:
      folder: where the orbax checkpoint will be; must not exist.
      batch_bytes: arrays are gathered up to this size before they are written.
    """

    def __init__(self, folder: Path, *, batch_bytes: int = BATCH_BYTES):
        self._folder = folder
        self._limit = batch_bytes
        self._batch: dict[str, np.ndarray] = {}
        self._arrays: dict[str, dict[str, Any]] = {}

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """Shape and dtype of everything added so far, by name."""
        return self._arrays

    def reserve(self, size: int) -> None:
        """Writes out what is held if `size` more bytes would exceed the batch; call it before making an array."""
        if self._batch and size + sum(array.nbytes for array in self._batch.values()) > self._limit:
            self._write()

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds an array; it must not be changed afterwards."""
        self.reserve(array.nbytes)
        self._batch[name] = array
        self._arrays[name] = {"shape": list(array.shape), "dtype": array.dtype.name}

    def close(self) -> Record:
        """Finishes the checkpoint and returns its record."""
        self._write()
        with _orbax("cannot write the arrays", self._folder), _plain(self._folder) as path:
            ocp.partial.finalize(path)
        return {"arrays": self._arrays, "files": _digests(self._folder, _files(self._folder))}

    def _write(self) -> None:
        if self._batch:
            with _orbax("cannot write the arrays", self._folder), _plain(self._folder) as path, _context():
                ocp.partial.save(path, self._batch)
        self._batch = {}


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
        raise CheckpointError(what, where=folder, got=detail, mend=mend) from error


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[str]:
    """`folder` by a name that orbax, which takes paths for glob patterns, can be given."""
    if not set("*?[") & set(str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, "link")
        link.symlink_to(folder.parent, target_is_directory=True)
        yield str(link / folder.name)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digests(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    def digest(name: str) -> dict[str, Any]:
        with open(folder / name, "rb") as file:
            return {
                "bytes": (folder / name).stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


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
