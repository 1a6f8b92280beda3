"""config.json of a HuggingFace folder -> ModelConfig. Needs neither transformers nor torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.foreign_weights import check_weights_are_plain
from checkpoints_convert.json_files import FILE_NAME, read_json
from checkpoints_convert.rules import Family
from checkpoints_convert.tensor_names import MERGE_ADAPTER, some
from polarjax.checkpoint.writer import is_model_directory
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, UnsupportedConfigError
from polarjax.types import Path as PathLike

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS_FILE = "transformers_weights"
"""The key that names the file of the weights."""


def config_from_hf(source: PathLike | Mapping[str, Any]) -> ModelConfig:
    """The configuration of a HuggingFace model.

    Args:
      source: its folder, or the contents of its config.json.

    Raises:
      CheckpointError: there is no readable config.json.
      UnsupportedConfigError: an unsupported key or value; the message names it.
    """
    return read_config(source)[1]


class HfConfig(NamedTuple):
    """What a config.json says.

    Attributes:
      family: the model's family.
      config: the model's configuration.
      notes: one line about the ignored keys, if any.
      weights: the file that holds the weights or their index, if it names one.
    """

    family: Family
    config: ModelConfig
    notes: tuple[str, ...]
    weights: str | None


def read_config(source: PathLike | Mapping[str, Any]) -> HfConfig:
    """The family, configuration and notes; see `config_from_hf`."""
    if isinstance(source, Mapping):
        return _interpret(source, CONFIG)
    file = Path(source) / CONFIG
    if not file.is_file():
        raise _missing(file.parent)
    if is_model_directory(file.parent):
        raise CheckpointError(
            "this is a model directory already, not a HuggingFace folder",
            where=file.parent,
            hint="use it as it is; polarjax export makes a HuggingFace folder of it",
        )
    return _interpret(read_json(file, last_wins=True), file)


def _missing(folder: Path) -> CheckpointError:
    what, hint = f"{CONFIG} is missing", "give the folder of a HuggingFace model"
    if folder.is_file():
        what = "a file, not a folder"
    elif not folder.is_dir():
        what = "no such folder"
    elif (folder / ADAPTER_CONFIG).is_file():
        what, hint = "this is an adapter (LoRA) without its model", MERGE_ADAPTER
    elif (folder / "params.json").is_file():
        what, hint = "this is Meta's or Mistral's own format", "use the HuggingFace version of this model"
    elif any(folder.glob("*.gguf")):
        what, hint = "this is a llama.cpp model (GGUF)", "use the original weights"
    return CheckpointError(what, where=folder, hint=hint)


def _interpret(data: Mapping[str, Any], where: object) -> HfConfig:
    model_type = data.get("model_type")
    if model_type == "mistral" and "layer_types" in data:
        model_type = "ministral"  # as in transformers' AutoConfig, even where the key is null
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedConfigError(
            "unsupported model_type",
            where=where,
            got=repr(model_type),
            expected=" or ".join(FAMILIES),
            hint="use a model of one of these families",
        )
    family = FAMILIES[model_type]
    reader = ConfigReader(data, where)
    config = interpret(family, reader)
    weights = _weights_file(reader)
    ignored = reader.ignored()
    note = f"{CONFIG} has keys that {model_type} models don't read; ignored: {some(ignored)}"
    return HfConfig(family, config, (note,) if ignored else (), weights)


def _weights_file(reader: ConfigReader) -> str | None:
    """The value of `transformers_weights`: like transformers, only safetensors or their index."""
    name = reader.get(WEIGHTS_FILE, None, str, "the name of a file")
    if name is not None and not re.fullmatch(rf"{FILE_NAME}\.safetensors(\.index\.json)?", name):
        expected = "a file beside config.json: *.safetensors or *.safetensors.index.json"
        hint = "remove the key if model.safetensors or its index is meant"
        raise reader.refuse(WEIGHTS_FILE, "not a file that can be read", name, expected, hint)
    return name


def interpret(family: Family, reader: ConfigReader) -> ModelConfig:
    """Reads a family's configuration; raises `UnsupportedConfigError` if the weights mean something else."""
    if family.own_code:
        reader.ignore("auto_map")
    reader.only("is_encoder_decoder", False, "use a decoder-only model")
    reader.only("per_layer_config", {}, "use a model whose layers all have the same shape")
    config = family.read_config(reader)
    check_weights_are_plain(reader)
    return config
