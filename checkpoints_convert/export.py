"""A model directory -> a HuggingFace folder with safetensors, one tensor at a time; the inverse of `convert`."""

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.convert import Progress, check_disjoint, counter
from checkpoints_convert.dtypes import SPELLINGS
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.hf_config import CONFIG, WEIGHTS_FILE, interpret, read_config
from checkpoints_convert.rules import Family, Step, expected_tensors, letter_sizes
from checkpoints_convert.weights_io import INDEX, SINGLE
from polarjax.checkpoint.reader import ModelReader
from polarjax.configs import ModelConfig
from polarjax.errors import InputError, UnsupportedConfigError
from polarjax.numeric import check_flags, shown
from polarjax.storage.atomic import absolute, atomic_folder, write_json
from polarjax.types import Path as PathLike

SHARD_BYTES = 5_000_000_000
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export did.

    Attributes:
      path: the HuggingFace folder.
      model_type: its family.
      dtype: the tensors' dtype.
      tensors: how many were written.
      num_bytes: their size.
      files: names of all files in the folder.
      seconds: how long it took.
    """

    path: Path
    model_type: str
    dtype: str
    tensors: int
    num_bytes: int
    files: tuple[str, ...]
    seconds: float


def export_checkpoint(
    src: PathLike,
    out: PathLike,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Writes a model directory as a HuggingFace folder that transformers loads; `out` appears complete or not at all.

    Tensors are bit-identical to the parameters. config.json is the source's if the directory has kept it, minus
    auto_map and transformers_weights. Routers and plans are not exported. Holds about twice the largest tensor in
    memory.

    Args:
      src: a model directory.
      out: the folder to make.
      shard_bytes: maximum bytes of tensors per file; a larger tensor gets its own file.
      overwrite: whether `out` is replaced if it holds only what an export writes: config.json, safetensors, tokenizer
        files. An original checkpoint can look like that too.
      progress: called with a description, a total and its unit; `polarjax.progress.task` is one.

    Raises:
      InputError: `shard_bytes` is not positive, or `overwrite` neither True nor False.
      CheckpointError: the model directory is damaged, or `out` cannot be written.
      UnsupportedConfigError: no transformers family can express this configuration.
    """
    started = time.monotonic()
    check_flags("export_checkpoint", overwrite=overwrite)
    if type(shard_bytes) is not int or shard_bytes < 1:
        what, hint = "not a positive number of bytes", "omit it for 5 GB"
        raise InputError(what, where="shard_bytes", got=shown(shard_bytes), hint=hint)
    target, source = absolute(out), ModelReader(src)
    check_disjoint(source.folder, target)
    family, data = hf_config(source)
    steps = list(expected_tensors(family, source.config).values())
    shards = _shards(steps, source, shard_bytes)
    options = {"overwrite": overwrite, "may_replace": is_hf_export, "num_bytes": source.num_bytes()}
    with atomic_folder(target, **options) as folder:
        source.verify()
        with counter(progress, source.num_bytes(), "exporting") as advance:
            for name, part in shards.items():
                for size in _write_shard(folder / name, part, source):
                    advance(size)
        if len(shards) > 1:
            write_json(folder / INDEX, _index(shards, source))
        write_json(folder / CONFIG, data)
        if source.tokenizer_folder.is_dir():
            shutil.copytree(source.tokenizer_folder, folder, dirs_exist_ok=True)
        files = tuple(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
    return Export(
        path=target,
        model_type=family.model_type,
        dtype=source.dtype.name,
        tensors=len(steps),
        num_bytes=source.num_bytes(),
        files=files,
        seconds=time.monotonic() - started,
    )


def hf_config(source: ModelReader) -> tuple[Family, dict[str, Any]]:
    """The family and config.json of a model directory: the source's if it was kept, otherwise generated.

    Raises:
      UnsupportedConfigError: no transformers family can express this configuration.
    """
    dtype = source.dtype.name
    kept = source.source_config
    if kept is not None:
        family, config, *_ = read_config(kept)
        if config == source.config:
            keys = [key for key in ("dtype", "torch_dtype") if key in kept] or ["torch_dtype"]
            plain = {key: value for key, value in kept.items() if key not in ("auto_map", WEIGHTS_FILE)}
            return family, plain | dict.fromkeys(keys, dtype)
    known = source.model_type in FAMILIES
    families = [FAMILIES[source.model_type]] if known else list(FAMILIES.values())  # pyrefly: ignore[bad-index]
    for family in families:
        data = written_config(family, source.config)
        if data is not None:
            return family, {**data, "torch_dtype": dtype, **_token_ids(source.tokenizer_folder)}
    raise UnsupportedConfigError(
        "no transformers family can express this configuration",
        where=source.folder,
        expected=" or ".join(family.model_type for family in families),
        hint="keep using the model directory with polarjax",
    )


def written_config(family: Family, config: ModelConfig) -> dict[str, Any] | None:
    """config.json of a configuration in a family's keys; None if the family can't express it."""
    keys = family.write_config(config)
    data = {"architectures": [family.architecture], "model_type": family.model_type, **keys}
    try:
        same = interpret(family, ConfigReader(data, CONFIG)) == config
    except UnsupportedConfigError:
        return None
    return data if same else None


def is_hf_export(folder: Path) -> bool:
    """Whether a folder contains only what an export writes: config, safetensors and tokenizer files."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    kinds = (".json", ".safetensors", ".jinja", ".txt", ".model")
    weights = any(name.endswith(".safetensors") for name in names)
    return CONFIG in names and weights and all(name.endswith(kinds) for name in names)


def _token_ids(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    data = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {key: data[key] for key in _TOKEN_IDS if data.get(key) is not None}


def _shards(steps: Sequence[Step], source: ModelReader, most: int) -> dict[str, list[Step]]:
    """Assigns tensors to files, in the order of the rules."""
    parts: list[list[Step]] = [[]]
    filled = 0
    for step in steps:
        size = _num_bytes(step, source)
        if parts[-1] and filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(step)
        filled += size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    count = len(parts)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _num_bytes(step: Step, source: ModelReader) -> int:
    return int(np.prod(step.shape, dtype=np.int64)) * source.dtype_of(step.target).itemsize


def _write_shard(file: Path, steps: Sequence[Step], source: ModelReader) -> Iterator[int]:
    """Writes one file in the layout of safetensors, tensor by tensor; yields the bytes of each once written."""
    sizes = letter_sizes(source.config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for step in steps:
        start, end = end, end + _num_bytes(step, source)
        kind, shape = SPELLINGS[source.dtype_of(step.target).name], list(step.layout.source_shape(sizes))
        header[step.source] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for step in steps:
            array = step.layout.to_source(source.read(step.target), header[step.source]["shape"])
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            yield array.nbytes
    with safe_open(file, "np"):
        pass  # check that the library accepts the file


def _index(shards: dict[str, list[Step]], source: ModelReader) -> dict[str, Any]:
    places = {step.source: name for name, part in shards.items() for step in part}
    return {"metadata": {"total_size": source.num_bytes()}, "weight_map": dict(sorted(places.items()))}
