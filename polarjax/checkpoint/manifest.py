"""Reads and checks the JSON files of a model directory (for the layout, see `polarjax.checkpoint.bundle`)."""

from pathlib import Path
from typing import Any

from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, InputError
from polarjax.model.shapes import shapes
from polarjax.selection.importance import Importance, check_importance
from polarjax.storage.atomic import read_json
from polarjax.storage.record import check_record

FORMAT = 2
"""Version of a model directory's layout as it is written."""

_READABLE = (1, FORMAT)  # 1: large files have no CRC-32s

SOURCE_CONFIG = "hf_config.json"
ROUTERS = "routers"
SPARSIFY = "run polarjax sparsify again"
AGAIN = "convert the source again: polarjax convert HF_DIR OUT --overwrite"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a model directory; raises `CheckpointError` if it is not one, or has another format."""
    if not folder.is_dir():
        hint = "pass a folder that polarjax convert wrote"
        what = "a file, not a model directory" if folder.is_file() else "no such model directory"
        raise CheckpointError(what, where=folder, hint=hint)
    file = folder / "manifest.json"
    if not file.is_file():
        hint = "this looks like a HuggingFace folder, so run: polarjax convert" if _is_hf(folder) else AGAIN
        raise CheckpointError("not a model directory: manifest.json is missing", where=folder, hint=hint)
    manifest = read_part(file, ("format", "model_type", "dtype", "params"))
    check_record(manifest["params"], where=file, hint=AGAIN)
    if manifest["dtype"] not in [entry["dtype"] for entry in manifest["params"]["arrays"].values()]:
        expected = "the parameters' dtype"
        raise CheckpointError(
            "wrong dtype in the manifest", where=file, got=manifest["dtype"], expected=expected, hint=AGAIN
        )
    return manifest


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model directory."""
    data = read_part(folder / "config.json", ("format",))
    data.pop("format")
    return ModelConfig.from_json(data)


def check_parameters(manifest: dict[str, Any], config: ModelConfig, folder: Path) -> None:
    """Raises `CheckpointError` unless a manifest lists the parameters of a configuration."""
    expected = {name: list(shape) for name, shape in shapes(config).items()}
    found = {name: entry["shape"] for name, entry in manifest["params"]["arrays"].items()}
    names = sorted(expected.keys() | found.keys())
    if wrong := [name for name in names if found.get(name) != expected.get(name)]:
        what = "config.json and manifest.json are for different models"
        got = f"missing, unknown or of the wrong shape: {', '.join(wrong[:10])}"
        raise CheckpointError(what, where=folder, got=got, hint=AGAIN)


def read_source_config(folder: Path) -> dict[str, Any] | None:
    """config.json of the HuggingFace source of a model directory, if any."""
    file = folder / SOURCE_CONFIG
    return read_json(file, hint=AGAIN) if file.is_file() else None


def read_part(file: Path, keys: tuple[str, ...], hint: str = AGAIN) -> dict[str, Any]:
    """The object in a file, which must have `keys`, and this format if it states one.

    Raises:
      CheckpointError: the file is missing, damaged, or in another format.
    """
    data = read_json(file, hint=hint)
    if not all(key in data for key in keys):
        expected = f"the keys {', '.join(keys)}"
        raise CheckpointError("not a polarjax file", where=file, expected=expected, hint=hint)
    if data.get("format", FORMAT) not in _READABLE:
        raise CheckpointError(
            "written in another format",
            where=file,
            got=f"format {data['format']}",
            expected=f"format {FORMAT}",
            hint="update polarjax, or convert the source again with this version",
        )
    return data


def importance_of_routers(data: dict[str, Any], file: Path) -> Importance:
    """What the routers rank groups by; earlier versions did not record it."""
    try:
        return check_importance(data.get("importance", "norms"), "importance")
    except InputError as error:
        got, expected = error.got, error.expected
        raise CheckpointError(error.what, where=file, got=got, expected=expected, hint=SPARSIFY) from error


def describe_routers(folder: Path) -> dict[str, Any] | None:
    """What the routers in a folder rank groups by, whether mean outputs replace skipped groups, and the units of the
    group routers' hidden layer; None if absent."""
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    data = read_part(file, ("format", "arrays"), SPARSIFY)
    check_record(data["arrays"], where=file, hint=SPARSIFY)
    arrays = data["arrays"]["arrays"]
    means = any(name.endswith(".mean") for name in arrays)
    width = max(
        (value["shape"][-1] for name, value in arrays.items() if name.endswith(".group_in")), default=0
    )
    return {"importance": importance_of_routers(data, file), "mean_outputs": means, "router_width": width}


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "model_type" in (folder / "config.json").read_text(
        "utf-8", "replace"
    )
