"""The tensors of a HuggingFace folder: where each one is, and reading them one at a time.

The safetensors library validates the headers; torch, those of .bin files. The bytes are then read directly from the
file: through the libraries' memory maps they would be in memory twice.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.json_files import FILE_NAME, parse_json, read_json
from checkpoints_convert.read_ahead import RANGE_BYTES, FileRange, read_ahead
from checkpoints_convert.tensor_names import MERGE_ADAPTER, ROTARY_BUFFERS, some
from checkpoints_convert.torch_files import read_torch_header
from polarjax.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
WEIGHTS = (SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX)
"""The files that name the weights, in the order in which transformers looks for them."""

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
DAMAGED = "a truncated or damaged weights file"
_DOWNLOAD = "download the file again"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is.

    Attributes:
      name: its name in the checkpoint.
      file: the file that holds it.
      kind: its dtype as the file spells it.
      shape: the tensor's shape.
      offset: offset of its first byte in the file.
      strides: in elements; None if the file holds it in row-major order.
    """

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype; raises `CheckpointError` unless it is one of `DTYPES`."""
        if self.kind not in DTYPES:
            raise CheckpointError(
                f"unsupported dtype of {self.name}",
                where=self.file,
                got=self.kind,
                expected=", ".join(DTYPES),
                hint=_dtype_hint(self.kind),
            )
        return DTYPES[self.kind]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    @property
    def matrix(self) -> tuple[int, int]:
        """Its rows and columns; anything but a matrix is one row."""
        return (self.shape[0], self.shape[1]) if len(self.shape) == 2 else (1, self.size)

    def ranges(self) -> list[FileRange]:
        """File ranges of a few rows each; none if the file holds it in another order."""
        rows, columns = self.matrix
        row = columns * self.dtype.itemsize
        if self.strides is not None or not rows * row:
            return []
        step = max(RANGE_BYTES // row, 1)
        return [
            FileRange(self.file, self.offset + start * row, (min(start + step, rows) - start) * row)
            for start in range(0, rows, step)
        ]

    def read(self) -> np.ndarray:
        """Reads the whole tensor.

        Raises:
          CheckpointError: the file no longer holds it.
        """
        count = (
            self.num_bytes if self.strides is None else self.dtype.itemsize * _span(self.shape, self.strides)
        )
        with self._read_errors():
            (memory,) = read_ahead([FileRange(self.file, self.offset, count)])
        array = self._whole(memory, count).view(self.dtype)
        if self.strides is None:
            return array.reshape(self.shape)
        steps = [step * array.itemsize for step in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(array, self.shape, steps))

    @contextlib.contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError("cannot be read", where=self.file, got=error.strerror) from error

    def _whole(self, memory: np.ndarray, size: int) -> np.ndarray:
        if memory.size != size:
            raise CheckpointError(f"the file ends within {self.name}", where=self.file, hint=_DOWNLOAD)
        return memory


def _dtype_hint(kind: str) -> str:
    if kind in ("F64", "float64"):
        return (
            "load the model with transformers and save it in one of these: model.float().save_pretrained(...)"
        )
    if kind in ("I64", "int64", "I32", "int32", "BOOL", "bool", "C64", "complex64", "complex128"):
        return "this is not a language model's weight; use the original weights"
    return "quantized checkpoints are unsupported; use the original weights"


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided tensor."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if all(shape) else 0


def read_rows(tensors: Sequence[Tensor]) -> Generator[np.ndarray, None, None]:
    """Yields all rows of the tensors in order, a few of one tensor at a time; valid until the next are read.

    Raises:
      CheckpointError: a file no longer holds them.
    """
    with contextlib.closing(read_ahead([each for tensor in tensors for each in tensor.ranges()])) as found:
        for tensor in tensors:
            if tensor.strides is not None:
                yield tensor.read().reshape(tensor.matrix)
            for each in tensor.ranges():
                with tensor._read_errors():
                    memory = next(found)
                yield tensor._whole(memory, each.size).view(tensor.dtype).reshape(-1, tensor.matrix[1])


def open_weights(folder: Path, named: str | None = None) -> dict[str, Tensor]:
    """Every tensor of a HuggingFace folder, by name; only headers are read.

    Args:
      folder: where the files are.
      named: the file to read, a single one or an index; None takes the first of `WEIGHTS`.

    Raises:
      CheckpointError: there are no weights, or a file or the index is damaged; the message names it.
    """
    name = named or next((name for name in WEIGHTS if _is_there(folder, name)), None)
    if name is None:
        raise _no_weights(folder)
    read_header = _read_torch_header if name in (TORCH_SINGLE, TORCH_INDEX) else _read_header
    path = _inside(folder, name, "a weights file is missing")
    return _sharded(path, read_header) if name.endswith(".index.json") else read_header(path)


def unused_weights(folder: Path, named: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The file that `open_weights` reads, and the other weights files, which transformers ignores too."""
    there = [name for name in WEIGHTS if _is_there(folder, name)]
    first = named or there[0]
    return first, tuple(name for name in there if name != first)


def _is_there(folder: Path, name: str) -> bool:
    """Whether to read this file, as transformers would; a broken link or folder counts only if there is no real file."""
    if (folder / name).is_file():
        return True
    return os.path.lexists(folder / name) and not any((folder / other).is_file() for other in WEIGHTS)


def _no_weights(folder: Path) -> CheckpointError:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"download {INDEX} too" if others else "give a folder with safetensors weights, or .bin ones"
    what = "no weights"
    adapters = [name for name in ADAPTERS if (folder / name).exists()]
    if adapters:
        what, others, hint = "only an adapter's weights", adapters, MERGE_ADAPTER
    elif models := sorted(path.name for path in folder.glob("*.gguf")):
        what, others, hint = "only llama.cpp weights", models, "use the original weights"
    got = some(others) if others else None
    expected = f"{SINGLE} or {INDEX}"
    return CheckpointError(what, where=folder, got=got, expected=expected, hint=hint)


def _sharded(index: Path, read_header: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all shards, including those not in the index, as in transformers."""
    weight_map = read_index(index)
    files = {name: _inside(index.parent, name) for name in sorted(set(weight_map.values()))}
    shards = {name: read_header(path) for name, path in files.items()}
    times = Counter(name for shard in shards.values() for name in shard)
    faults = {
        "in two shards": [name for name, count in times.items() if count > 1],
        "not in the shard that the index names": [
            name
            for name, shard in weight_map.items()
            if name not in shards[shard] and not re.search(ROTARY_BUFFERS, name)
        ],
    }
    found = [f"{len(names)} {fault}: {some(sorted(names))}" for fault, names in faults.items() if names]
    if found:
        hint = "download the whole folder again"
        raise CheckpointError("index and shards disagree", where=index, got="; ".join(found), hint=hint)
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def read_index(file: Path) -> Mapping[str, str]:
    """The shard of each tensor: the plain name of a file beside the index."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("not an index of weights", where=file, expected="a weight_map", hint=_DOWNLOAD)
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(FILE_NAME, shard):
            expected = "the name of a file beside the index"
            hint = "do not trust this checkpoint"
            raise CheckpointError(
                "the index points outside its folder",
                where=file,
                got=repr(shard),
                expected=expected,
                hint=hint,
            )
    return weight_map


def _inside(folder: Path, name: str, missing: str = "a shard is missing") -> Path:
    """The file `name` of `folder`; links may only point into the folder or to a hub cache's blobs."""
    path = folder / name
    if not os.path.exists(path):  # also False for names that the system rejects
        raise CheckpointError(missing, where=path, hint="download it too")
    root = folder.resolve()
    allowed = {root, root.parents[1] / "blobs"} if root.parent.name == "snapshots" else {root}
    if path.resolve().parent not in allowed:
        got, hint = path.resolve(), "copy the file into the folder if you trust it"
        raise CheckpointError("a weights file links outside its folder", where=path, got=got, hint=hint)
    return path


def _read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, validated."""
    if not file.is_file():
        what, hint = _diagnosis(file)
        raise CheckpointError(what, where=file, hint=hint)
    try:
        with safe_open(file, "np"):
            pass
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        what, hint = _diagnosis(file)
        raise CheckpointError(what, where=file, got=str(error)[:200], hint=hint) from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _read_torch_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one .bin file."""
    what, hint = _diagnosis(file)
    if what != DAMAGED:
        raise CheckpointError(what, where=file, hint=hint)
    return {name: Tensor(name, file, *placed) for name, placed in read_torch_header(file).items()}


def _diagnosis(file: Path) -> tuple[str, str]:
    """Says what a file that is not safetensors is, with a hint."""
    if not file.is_file():
        what = "a folder" if file.is_dir() else "a special file"
        return f"{what} where a weights file should be", _DOWNLOAD
    with open(file, "rb") as stream:
        start = stream.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights", "run git lfs pull in that folder"
    if start.lstrip()[:1] == b"<":
        return (
            "this is a web page, not the weights",
            "download the file itself, logged in if the model is gated",
        )
    return DAMAGED if start else "the weights file is empty", _DOWNLOAD
