"""Reading the tensors of a HuggingFace folder, one at a time, from safetensors files with or without an index."""

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from polarjax.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the safetensors dtypes that a weight may have."""

_SHOWN = 10
_DOWNLOAD = "download the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint: where each lies, and its shape. Nothing is held in memory.

    Attributes:
      folder: the checkpoint.
      files: the file of every tensor, by name.
      shapes: the shape of every tensor, by name.
      sizes: the bytes of every tensor, by name.
    """

    folder: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype (bfloat16 as ml_dtypes' type)."""
        with _opened(self.files[name]) as file:
            return file.get_tensor(name)


def open_weights(folder: Path) -> Weights:
    """Lists the tensors of `folder` and checks that its files hold just them.

    Raises:
      CheckpointError: no weights, a file that is missing, damaged or not safetensors, an index that points
        out of the folder or does not agree with the files, a dtype that is not a float of 16 or 32 bits.
    """
    if (folder / INDEX).is_file():
        files = _indexed(folder)
    elif (folder / SINGLE).exists():
        files = dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
    else:
        expected = f"{SINGLE} or {INDEX}"
        mend = "give a folder with safetensors weights, as save_pretrained writes it"
        raise CheckpointError("no weights", where=folder, expected=expected, mend=mend)
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[str, int] = {}
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in (name for name, where in files.items() if where == path):
                shapes[name], sizes[name] = _described(file.get_slice(name), name, path)
    return Weights(folder, files, shapes, sizes)


def _described(tensor: Any, name: str, path: Path) -> tuple[tuple[int, ...], int]:
    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    if dtype not in _DTYPES:
        mend = "quantised checkpoints are unsupported; take the original weights"
        raise CheckpointError(
            f"unsupported dtype of {name}", where=path, got=dtype, expected=", ".join(_DTYPES), mend=mend
        )
    return shape, int(np.prod(shape, dtype=np.int64)) * _DTYPES[dtype]


def _indexed(folder: Path) -> dict[str, Path]:
    """The file of every tensor as the index says, once the files have been seen to agree."""
    where = folder / INDEX
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError("not an index of weights", where=where, expected="a weight_map", mend=_DOWNLOAD)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                "the index points out of its folder", where=where, got=shard, mend=_DOWNLOAD
            )
        if not (folder / shard).exists():
            raise CheckpointError("a shard is missing", where=folder / shard, mend=_DOWNLOAD)
    held = {shard: _names(folder / shard) for shard in shards}
    _agree(where, weight_map, held)
    return {name: folder / shard for name, shard in weight_map.items()}


def _agree(where: Path, weight_map: Mapping[str, str], held: Mapping[str, frozenset[str]]) -> None:
    times = Counter(name for names in held.values() for name in names)
    faults = {
        "not in its shard": [name for name, shard in weight_map.items() if name not in held[shard]],
        "in two shards": [name for name, count in times.items() if count > 1],
        "not in the index": [name for name in times if name not in weight_map],
    }
    told = [
        f"{len(names)} {fault}: {', '.join(sorted(names)[:_SHOWN])}"
        for fault, names in faults.items()
        if names
    ]
    if told:
        raise CheckpointError("index and shards disagree", where=where, got="; ".join(told), mend=_DOWNLOAD)


def _names(path: Path) -> frozenset[str]:
    with _opened(path) as file:
        return frozenset(file.keys())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        what, mend = _diagnosis(path)
        got = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise CheckpointError(what, where=path, got=got, mend=mend) from error


def _diagnosis(path: Path) -> tuple[str, str]:
    """What a file that is not safetensors is instead, and the mend."""
    if path.is_dir():
        return "a directory where a weights file should be", _DOWNLOAD
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights", "run git lfs pull"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not the weights", _DOWNLOAD
    return "empty weights file" if not head else "damaged weights file", _DOWNLOAD


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: the file is missing, or holds anything else.
    """
    try:
        data = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        mend = "give a folder as save_pretrained writes it"
        raise CheckpointError("no such file", where=file, mend=mend) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "not readable as JSON", where=file, got=str(error)[:200], mend=_DOWNLOAD
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=file, got=type(data).__name__, mend=_DOWNLOAD)
    return data
