"""Saves what tuning has learned so far, and reads it again."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from polarjax.errors import CheckpointError
from polarjax.memory import tree_bytes
from polarjax.sparsity.distillation import TuneState
from polarjax.storage.array_reader import read_arrays
from polarjax.storage.arrays import ArrayWriter
from polarjax.storage.atomic import atomic_folder, read_json, write_json

_FORMAT = 1
_META = "tuning.json"
_AGAIN = "start over: remove the folder, or drop --resume and give another output"


def is_state(folder: Path) -> bool:
    """Whether `folder` was written by `save_state`."""
    return (folder / _META).is_file()


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
    if not is_state(folder):
        hint = "drop --resume to start"
        raise CheckpointError("there is no interrupted tuning to resume", where=folder, hint=hint)
    meta = read_json(folder / _META, hint=_AGAIN)
    saved = meta.get("settings", {})
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
    flat = read_arrays(folder / "arrays", meta["arrays"], hint=_AGAIN)
    leaves = [flat[name] for name in _named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), float(meta["seconds"])


def _named(state: TuneState) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
