"""config.json of a HuggingFace folder -> ModelConfig. Needs neither transformers nor torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.json_files import read_json
from checkpoints_convert.rules import Family
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, UnsupportedConfigError
from polarjax.types import Path as PathLike

CONFIG = "config.json"


def config_from_hf(source: PathLike | Mapping[str, Any]) -> ModelConfig:
    """The configuration of a HuggingFace model.

    Args:
      source: its folder, or what its config.json holds.

    Raises:
      CheckpointError: there is no readable config.json.
      UnsupportedConfigError: a key or value that polarjax does not know; it is named.
    """
    return read_config(source)[1]


def read_config(source: PathLike | Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family beside the configuration; see `config_from_hf`."""
    if isinstance(source, Mapping):
        return _interpret(source, CONFIG)
    file = Path(source) / CONFIG
    if not file.is_file():
        what = f"{CONFIG} is missing" if file.parent.is_dir() else "no such folder"
        raise CheckpointError(what, where=file.parent, hint="give the folder of a HuggingFace model")
    return _interpret(read_json(file), file)


def _interpret(data: Mapping[str, Any], where: object) -> tuple[Family, ModelConfig]:
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedConfigError(
            "unsupported model_type",
            where=where,
            got=repr(model_type),
            expected=" or ".join(FAMILIES),
            hint="take a model of one of these families",
        )
    family = FAMILIES[model_type]
    reader = ConfigReader(data, where)
    reader.check_fixed()
    config = family.read_config(reader)
    reader.finish()
    return family, config
