"""From a HuggingFace folder to a model directory, tensor by tensor."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.rules import Family, Plan, make_plan
from checkpoints_convert.weights_io import Weights, open_weights, read_json
from polarjax.checkpoint import ModelWriter, new_model
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, UnsupportedConfigError
from polarjax.progress import task
from polarjax.types import DTypeLike

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      path: the model directory.
      config: of the model.
      model_type: the HuggingFace family.
      tensors: how many parameters were written.
      num_bytes: their size as read.
      skipped: source tensors that follow from the config and were left out.
      tokenizer: whether tokenizer files were copied.
    """

    path: Path
    config: ModelConfig
    model_type: str
    tensors: int
    num_bytes: int
    skipped: tuple[str, ...]
    tokenizer: bool


def config_from_hf(folder: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a HuggingFace folder.

    Raises:
      CheckpointError: there is no readable config.json.
      UnsupportedConfigError: the model_type or a key is unknown, or a value cannot be represented.
    """
    return _read_config(Path(folder))[1]


def convert_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Conversion:
    """Converts a HuggingFace folder with safetensors weights into a model directory.

    Every source tensor is used exactly once and every parameter filled exactly once. Tensors are read, laid out
    and written one by one; `out` appears only when everything is there.

    Args:
      source: folder with config.json and model.safetensors, or shards with their index.
      out: the model directory to make.
      dtype: to convert to; None keeps each tensor's own.
      overwrite: whether an existing model directory is replaced.
      allow_nonfinite: whether NaN and infinities are let through.

    Raises:
      CheckpointError: files are missing, damaged or do not fit the config, or `out` cannot be written.
      UnsupportedConfigError: the model cannot be represented.
    """
    source, out = Path(os.path.abspath(source)), Path(os.path.abspath(out))
    family, config = _read_config(source)
    if source == out or source in out.parents:
        mend = "write to another place"
        raise CheckpointError("the output lies inside the source", where=out, got=source, mend=mend)
    weights = open_weights(source)
    plan = make_plan(family, config, weights.shapes, where=source)
    with new_model(out, config, model_type=family.model_type, overwrite=overwrite) as writer:
        _check_equal(weights, plan)
        _write_all(writer, weights, plan, dtype=dtype, allow_nonfinite=allow_nonfinite)
        tokenizer = _copy_tokenizer(source, writer)
    num_bytes = sum(weights.sizes[step.source] for step in plan.steps)
    return Conversion(out, config, family.model_type, len(plan.steps), num_bytes, plan.skipped, tokenizer)


def _read_config(folder: Path) -> tuple[Family, ModelConfig]:
    if not folder.is_dir():
        mend = "give a folder as save_pretrained writes it"
        raise CheckpointError("no such folder", where=folder, mend=mend)
    file = folder / "config.json"
    data = read_json(file)
    model_type = data.get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedConfigError(
            "unsupported model_type", where=file, got=repr(model_type), expected=" or ".join(sorted(FAMILIES))
        )
    reader = ConfigReader(data, file)
    config = FAMILIES[model_type].read_config(reader)
    reader.finish()
    return FAMILIES[model_type], config


def _write_all(
    writer: ModelWriter, weights: Weights, plan: Plan, *, dtype: DTypeLike | None, allow_nonfinite: bool
) -> None:
    total = sum(weights.sizes[step.source] for step in plan.steps)
    nonfinite = []
    with task("converting", total=total, unit="bytes") as advance:
        for step in plan.steps:
            size = weights.sizes[step.source]
            writer.reserve(size)
            array = weights.read(step.source)
            if not np.isfinite(array).all():
                nonfinite.append(step.source)
            array = step.layout.to_target(array, step.shape)
            writer.add(step.target, array if dtype is None else array.astype(jnp.dtype(dtype)))
            advance(size, step.source)
    if nonfinite and not allow_nonfinite:
        raise CheckpointError(
            "weights are NaN or infinite",
            where=weights.folder,
            got=f"{len(nonfinite)} tensors: {', '.join(nonfinite[:10])}",
            mend="take an undamaged checkpoint, or pass --allow-nonfinite",
        )


def _check_equal(weights: Weights, plan: Plan) -> None:
    for left, right in plan.equal:
        if not np.array_equal(weights.read(left), weights.read(right)):
            raise CheckpointError(
                "the config ties the head to the embeddings, but the two differ",
                where=weights.folder,
                got=f"{left} unequal to {right}",
                mend="set tie_word_embeddings to false in config.json if the head is meant",
            )


def _copy_tokenizer(source: Path, writer: ModelWriter) -> bool:
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for file in found:
        shutil.copyfile(file, writer.tokenizer_folder / file.name)
    return any(file.name.startswith(("tokenizer", "vocab")) for file in found)


def summary(conversion: Conversion) -> dict[str, Any]:
    """A conversion as JSON holds it."""
    return {**dataclasses.asdict(conversion), "config": conversion.config.to_json()}
