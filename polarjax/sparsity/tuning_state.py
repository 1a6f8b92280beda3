"""Saves what tuning has learned so far, and reads it again."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from polarjax.errors import CheckpointError, InputError
from polarjax.memory import tree_bytes
from polarjax.model.decoder import Decoder
from polarjax.model.parameters import fingerprint
from polarjax.selection.routers import Routers
from polarjax.sparsity.distillation import TuneState
from polarjax.sparsity.tuning_batches import Batches
from polarjax.storage.array_reader import read_arrays
from polarjax.storage.arrays import ArrayWriter
from polarjax.storage.atomic import atomic_folder, read_json, remove_stale, write_json
from polarjax.storage.fingerprint import fingerprint_of

_FORMAT = 1
_META = "tuning.json"
_AGAIN = "start over: remove the folder, or drop --resume and give another output"


def is_state(folder: Path) -> bool:
    """Whether `folder` was written by `save_state`."""
    return (folder / _META).is_file()


def settings_of(model: Decoder, routers: Routers, batches: Batches) -> dict[str, Any]:
    """What a run depends on, and a resumed one must have in common with it."""
    return {
        **batches.options.to_json(),
        "weights": fingerprint(model),
        "routers": routers.fingerprint,
        "texts": [fingerprint_of({"windows": np.asarray(each)}) for each in batches.domains],
        "shares": list(batches.shares),
        "seed": batches.seed,
        "layers": [list(batches.dense_layers), [list(row) for row in batches.budgets]],
    }


def save_state(folder: Path, state: TuneState, settings: dict[str, Any], seconds: float) -> None:
    """Writes the state, replacing an earlier one only when the new one is complete."""
    size = tree_bytes(state)
    with atomic_folder(folder, overwrite=True, may_replace=is_state, num_bytes=size) as temporary:
        with ArrayWriter(temporary / "arrays") as writer:
            for name, leaf in _named(state).items():
                writer.reserve(leaf.nbytes)
                writer.add(name, np.asarray(jax.device_get(leaf)))
            record = writer.close()
        meta = {"format": _FORMAT, "settings": settings, "seconds": seconds, "arrays": record}
        write_json(temporary / _META, meta)


def read_state(folder: Path, like: TuneState, settings: dict[str, Any]) -> tuple[TuneState, float]:
    """The saved state and the seconds of training so far.

    Args:
      folder: where `save_state` wrote.
      like: a state of the same structure; may be abstract.
      settings: must equal those that were saved, by name.

    Raises:
      CheckpointError: there is no such state, it is damaged, or it belongs to a run with other settings.
    """
    meta = check_state(folder, settings)
    flat = read_arrays(folder / "arrays", meta["arrays"], hint=_AGAIN)
    leaves = [flat[name] for name in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), float(meta["seconds"])


def find_state(folder: Path | None) -> Path:
    """The folder; raises `CheckpointError` unless an interrupted run is there, `InputError` for None.

    First brings back a state that a process was replacing when it was killed.
    """
    if folder is None:
        hint = "pass the folder of the interrupted run, or resume=False"
        raise InputError("nothing says where to resume from", where="tune: folder", hint=hint)
    remove_stale(folder)
    if not is_state(folder):
        hint = "drop --resume to start"
        raise CheckpointError("there is no interrupted tuning to resume", where=folder, hint=hint)
    return folder


def check_state(folder: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What the saved state's file says; raises as `read_state` does, for use before long work too."""
    folder = find_state(folder)
    meta = read_json(folder / _META, hint=_AGAIN)
    saved, arrays = meta.get("settings"), meta.get("arrays")
    if not isinstance(saved, dict) or not isinstance(arrays, dict) or "seconds" not in meta:
        raise CheckpointError("the saved state is damaged", where=folder / _META, hint=_AGAIN)
    differing = sorted(
        name for name in saved.keys() | settings.keys() if saved.get(name) != settings.get(name)
    )
    if meta.get("format") != _FORMAT or differing:
        name = differing[0] if differing else "format"
        raise CheckpointError(
            "the interrupted tuning was started with other settings",
            where=f"{folder}: {name}",
            got=str(saved.get(name))[:80],
            expected=str(settings.get(name))[:80],
            hint=f"resume with the same options and texts, or {_AGAIN}",
        )
    return meta


def _named(state: TuneState) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
