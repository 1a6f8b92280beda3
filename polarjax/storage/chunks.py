"""Where the values of named arrays lie in the files of an orbax checkpoint.

Orbax writes each array as chunks of equal shape (Zarr 3) and many chunks into one file (OCDBT). An uncompressed chunk is
a run of bytes in row-major order, so part of it can be read by itself, which TensorStore doesn't do.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.errors import CheckpointError
from polarjax.storage.plain_path import plain_path

type Box = tuple[
    tuple[int, int], ...
]  # part of an array: the first index along each axis, and the one after the last

_INDEX_BYTES = 20  # after a chunk: where its bytes are, and a checksum of that
_AXIS = "/c"  # between an array's name and the numbers of its chunk


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Part of an array.

    Attributes:
      box: what it holds, clipped to the array.
      shape: its shape as stored, at least one axis; those at the array's end may be longer than `box`.
      file, offset: where its bytes start; the file relative to the checkpoint.
      content: the bytes themselves, if they are so few that they are stored among the names; then there is no file.
    """

    box: Box
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    content: bytes = b""


def whole(shape: tuple[int, ...]) -> Box:
    """All of an array; a scalar counts as an array of one value."""
    return tuple((0, size) for size in shape) or ((0, 1),)


def chunks(folder: Path, arrays: Mapping[str, Mapping[str, Any]], *, hint: str) -> dict[str, list[Chunk]]:
    """The chunks of each array of a record, by name; what no chunk holds is zero.

    Args:
      folder: the orbax checkpoint.
      arrays: shape and dtype of each, by name; must match what is stored.
      hint: the error's hint.

    Raises:
      CheckpointError: the checkpoint is stored in another way or has other arrays.
    """
    tree = next(folder.glob("*/manifest.ocdbt"), folder / "state" / "manifest.ocdbt").parent
    try:
        entries = _entries(tree)
        return {name: _chunks(name, entry, entries, tree.name) for name, entry in arrays.items()}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        detail = next(iter(str(error).splitlines()), "")[:200]
        raise CheckpointError("the arrays cannot be read", where=folder, got=detail, hint=hint) from error


def _entries(tree: Path) -> dict[str, dict[str, Any]]:
    """Everything that an OCDBT database holds, by key: bytes, or where they are."""
    import tensorstore as ts

    with plain_path(tree) as path:
        base = ts.KvStore.open({"driver": "file", "path": f"{path}/"}).result()
        newest = ts.ocdbt.dump(base).result()["versions"][-1]
        if newest["root_height"] != 0:
            raise ValueError(f"a tree of height {newest['root_height']}")
        found = ts.ocdbt.dump(base, newest["root"]["location"]).result()["entries"]
    return {entry["key"].decode(): entry for entry in found}


def _chunks(name: str, array: Mapping[str, Any], entries: Mapping[str, Any], tree: str) -> list[Chunk]:
    """The chunks of one array; `ValueError` if it isn't stored as `polarjax.storage.arrays` does."""
    found = json.loads(entries[f"{name}/zarr.json"]["inline_value"])
    grid, shape = found["chunk_grid"]["configuration"]["chunk_shape"], tuple(array["shape"])
    if (tuple(found["shape"]), found["data_type"]) != (shape, array["dtype"]):
        raise ValueError(f"{name} is {found['data_type']} {found['shape']}")
    (codec,) = found["codecs"]
    inner = codec["configuration"] if codec["name"] == "sharding_indexed" else {"codecs": [codec]}
    little = [each.get("configuration", {"endian": "little"}) for each in inner["codecs"]]
    if inner.get("chunk_shape", grid) != grid or little != [{"endian": "little"}] or found["fill_value"] != 0:
        raise ValueError(f"{name} is stored as {json.dumps(found)}"[:200])
    stored = tuple(grid) or (1,)
    size = math.prod(stored) * np.dtype(array["dtype"]).itemsize
    extra = _INDEX_BYTES if "chunk_shape" in inner else 0
    counts = [-(-end // step) for (_, end), step in zip(whole(shape), stored, strict=True)]
    made = []
    for place in itertools.product(*map(range, counts)):
        key = "/".join([name + _AXIS, *(map(str, place) if shape else ())])
        if (entry := entries.get(key)) is None:
            continue  # TensorStore may leave out zeros
        steps = zip(whole(shape), stored, place, strict=True)
        box = tuple((i * step, min(end, (i + 1) * step)) for (_, end), step, i in steps)
        made.append(Chunk(box, stored, **_place(entry, size, size + extra, tree)))
    return made


def _place(entry: Mapping[str, Any], size: int, stored: int, tree: str) -> dict[str, Any]:
    """Where a chunk's `size` bytes are; `stored` with what follows them."""
    if "inline_value" in entry:
        content, length = entry["inline_value"][:size], len(entry["inline_value"])
        found: dict[str, Any] = {"content": content}
    else:
        _, base, file, offset, text = entry["indirect_value"].split(":")
        found, length = {"file": f"{tree}/{base}{file}", "offset": int(offset)}, int(text)
    if length != stored:
        raise ValueError(f"a chunk of {length} bytes instead of {stored}")
    return found
