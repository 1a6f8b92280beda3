"""config.json of a HuggingFace folder -> ModelConfig. Needs neither transformers nor torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.families import FAMILIES
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
    return _interpret(_parse(Path(source) / CONFIG), Path(source) / CONFIG)


def _interpret(data: Mapping[str, Any], where: object) -> tuple[Family, ModelConfig]:
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedConfigError(
            "unsupported model_type",
            where=where,
            got=repr(model_type),
            expected=" or ".join(FAMILIES),
            mend="take a model of one of these families",
        )
    family = FAMILIES[model_type]
    reader = ConfigReader(data, where)
    reader.check_fixed()
    config = family.read_config(reader)
    reader.finish()
    return family, config


def _parse(file: Path) -> dict[str, Any]:
    if not file.is_file():
        mend = "give the folder of a HuggingFace model"
        if not file.parent.is_dir():
            raise CheckpointError("no such folder", where=file.parent, mend=mend)
        raise CheckpointError(f"{CONFIG} is missing", where=file.parent, mend=mend)
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` when it is anything else or names a key twice."""
    try:
        data = json.loads(file.read_bytes(), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        mend = "download the file again"
        raise CheckpointError("not readable as JSON", where=file, got=str(error), mend=mend) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            "not a JSON object", where=file, got=type(data).__name__, mend="download it again"
        )
    return data


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object's dictionary; raises `ValueError` when a key occurs twice."""
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return data
