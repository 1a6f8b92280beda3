"""The tensors of PyTorch's .bin files: torch reads the pickle (weights only), we read the bytes.

A .bin file is a zip archive of one pickle and one uncompressed record per storage. torch maps the file into memory
and builds the tensors from the pickle; their addresses in the mapping give their offsets in the file, once storages
and records match in number, order and size.
"""

import mmap
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.dtypes import SPELLINGS
from polarjax.errors import CheckpointError

_SAFE = "use this model's safetensors, or load it once with PyTorch and save it as safetensors"
_DOWNLOAD = "download the file again"
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of the name and of the extra field, at bytes 26 and 28


class Placed(NamedTuple):
    """Where a tensor is in a .bin file.

    Attributes:
      kind: its dtype, in safetensors' spelling if a weight may have it.
      shape: the tensor's shape.
      offset: byte offset of its first element in the file.
      strides: in elements; None if it is contiguous.
    """

    kind: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None


class _Record(NamedTuple):
    offset: int
    size: int


def read_torch_header(file: Path) -> dict[str, Placed]:
    """The tensors of one .bin file, by name; nothing in the file is executed.

    Raises:
      CheckpointError: PyTorch is not installed, or the file is damaged, of another kind, or unsafe.
    """
    records = _records(file)
    state = _load(file)
    if not isinstance(state, Mapping):
        raise CheckpointError("not a dictionary of tensors", where=file, got=type(state).__name__, hint=_SAFE)
    others = sorted(str(name) for name, value in state.items() if not _is_weight(name, value))
    if others:
        got = f"{', '.join(others[:10])} of other kinds"
        raise CheckpointError("not a dictionary of only tensors", where=file, got=got, hint=_SAFE)
    base = _base(file, records, state.values())
    return {name: _placed(tensor, tensor.data_ptr() - base) for name, tensor in state.items()}


def _records(file: Path) -> list[_Record]:
    """The storages' records in file order; refuses archives that torch.save would not write."""
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
            members = archive.infolist()
            order = [archive.read(each) for each in members if each.filename.endswith("/byteorder")]
            found = [_record(stream, each) for each in members if _is_storage(each.filename)]
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        ValueError,
        RuntimeError,
        EOFError,
        OSError,
    ) as error:
        raise CheckpointError(
            "damaged, or not a .bin file of PyTorch 1.6 or later",
            where=file,
            got=str(error)[:200],
            hint=f"{_DOWNLOAD}, or, if it is from an older PyTorch, {_SAFE}",
        ) from error
    _check_members(file, members)
    if any(each.strip() != b"little" for each in order):
        raise CheckpointError("written by a big-endian machine", where=file, hint=_SAFE)
    return sorted(each for each in found if each.size)


def _is_storage(name: str) -> bool:
    return name.split("/")[-2:-1] == ["data"]


def _check_members(file: Path, members: Iterable[zipfile.ZipInfo]) -> None:
    names = [member.filename for member in members]
    roots = {name.partition("/")[0] for name in names}
    parts = {part for name in names for part in name.split("/")}
    outside = len(roots) != 1 or parts & {"", ".", ".."} or len(set(names)) != len(names)
    packed = [each.filename for each in members if each.compress_type or each.file_size != each.compress_size]
    if outside or packed:
        what = "compressed members" if packed else "members outside one folder, or duplicates"
        raise CheckpointError(
            f"an archive that PyTorch would not write: {what}",
            where=file,
            got=", ".join((packed or sorted(names))[:3]),
            hint="do not trust this checkpoint",
        )


def _record(stream: Any, member: zipfile.ZipInfo) -> _Record:
    stream.seek(member.header_offset)
    name, extra = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    return _Record(member.header_offset + _LOCAL_HEADER.size + name + extra, member.file_size)


def _load(file: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            "a .bin file needs PyTorch",
            where=file,
            hint="pip install 'polarjax[torch]', or use this model's safetensors",
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that are refused below
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "refused, because loading it could run code: it holds more than tensors",
            where=file,
            got=_reason(error),
            hint=_SAFE,
        ) from error
    except Exception as error:  # torch's readers raise nearly anything on a damaged file
        got = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError("a damaged .bin file", where=file, got=got, hint=_DOWNLOAD) from error


def _reason(error: Exception) -> str:
    """The part of torch's long message that names what was refused."""
    text = " ".join(str(error).split())
    text = text.partition(" Check the documentation")[0].rstrip(".")
    found = re.search(r"\b(Trying to load|Unsupported|WeightsUnpickler error)\b.*", text)
    return (found[0] if found else text)[:120]


def _is_weight(name: object, value: Any) -> bool:
    import torch

    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain


def _base(file: Path, records: list[_Record], tensors: Iterable[Any]) -> int:
    """The address of the file's first byte; storages and records must match one to one."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    found = sorted((address, size) for address, size in storages.items() if size)
    base = found[0][0] - records[0].offset if found and records else 0
    if [(address - base, size) for address, size in found] != records or base % mmap.PAGESIZE:
        raise CheckpointError(
            "the tensors do not match the stored bytes",
            where=file,
            got=f"{len(found)} storages of {sum(size for _, size in found)} bytes",
            expected=f"{len(records)} records of {sum(size for _, size in records)} bytes",
            hint=_DOWNLOAD,
        )
    return base


def _placed(tensor: Any, offset: int) -> Placed:
    kind = str(tensor.dtype).removeprefix("torch.")
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Placed(SPELLINGS.get(kind, kind), tuple(tensor.shape), offset, strides)
