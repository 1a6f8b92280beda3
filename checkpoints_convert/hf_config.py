"""config.json of a HuggingFace folder -> ModelConfig. Needs neither transformers nor torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.foreign_weights import check_weights_are_plain
from checkpoints_convert.json_files import read_json
from checkpoints_convert.rules import Family
from checkpoints_convert.tensor_names import MERGE_ADAPTER, some
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, UnsupportedConfigError
from polarjax.types import Path as PathLike

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


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
    """

    family: Family
    config: ModelConfig
    notes: tuple[str, ...]


def read_config(source: PathLike | Mapping[str, Any]) -> HfConfig:
    """The family, configuration and notes; see `config_from_hf`."""
    if isinstance(source, Mapping):
        return _interpret(source, CONFIG)
    file = Path(source) / CONFIG
    if not file.is_file():
        raise _missing(file.parent)
    return _interpret(read_json(file, last_wins=True), file)


def _missing(folder: Path) -> CheckpointError:
    what, hint = f"{CONFIG} is missing", "give the folder of a HuggingFace model"
    if not folder.is_dir():
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
    ignored = reader.ignored()
    note = f"{CONFIG} has keys that a {model_type} model does not read; ignored: {some(ignored)}"
    return HfConfig(family, config, (note,) if ignored else ())


def interpret(family: Family, reader: ConfigReader) -> ModelConfig:
    """Reads a family's configuration; raises `UnsupportedConfigError` if the weights mean something else."""
    if family.own_code:
        reader.ignore("auto_map")
    reader.only("is_encoder_decoder", False, "use a decoder-only model")
    reader.only("per_layer_config", {}, "use a model whose layers all have the same shape")
    config = family.read_config(reader)
    check_weights_are_plain(reader)
    return config
