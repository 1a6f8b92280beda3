"""Reads and writes the routers and plans of a model directory."""

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from polarjax.checkpoint.belonging import check_routers_of_plans, check_shape, check_weights
from polarjax.checkpoint.manifest import (
    FORMAT,
    ROUTERS,
    SPARSIFY,
    importance_of_routers,
    read_config,
    read_manifest,
    read_part,
)
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError
from polarjax.model.layout import ROUTER_AXES, Layout
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.storage.array_reader import read_arrays
from polarjax.storage.atomic import absolute, atomic_file, atomic_folder, dump_json, write_json
from polarjax.storage.record import check_record
from polarjax.types import Array

PLANS = "plans.json"
CALIBRATE = "run polarjax calibrate or polarjax sparsify again"

_ALWAYS = {"w_group", "b_group"}
_NO_NEURONS: dict[str, Any] = {"w_in": None, "w_out": None}


def store_routers(folder: Path, routers: Routers) -> None:
    """Writes routers: their arrays, what they rank groups by, and the fingerprints of them and of their model."""
    from polarjax.storage.arrays import ArrayWriter  # imports orbax

    folder.mkdir(exist_ok=True)
    with ArrayWriter(folder / "arrays") as writer:
        for name, value in routers.parameters().items():
            writer.add(name, np.asarray(value))
        data = {"format": FORMAT, "arrays": writer.close()}
        marks = {
            "weights": routers.weights,
            "fingerprint": routers.fingerprint,
            "importance": routers.importance,
        }
        write_json(folder / "manifest.json", data | marks)


def read_routers(
    folder: Path, config: ModelConfig, weights: str, layout: Layout | None = None
) -> Routers | None:
    """The routers in a model directory whose parameters have the fingerprint `weights`; None if there are none.

    They go to the mesh of `layout`, or to the default device.
    """
    if not os.path.lexists(folder):
        return None
    file = folder / "manifest.json"
    data = read_part(file, ("format", "arrays"), SPARSIFY)
    check_record(data["arrays"], where=file, hint=SPARSIFY)
    fields = _fields(data["arrays"]["arrays"], file)
    shardings = None
    if layout is not None:
        specs = {name: layout.router_spec(field) for name, (_, field) in fields.items()}
        shardings = {name: layout.sharding(spec) for name, spec in specs.items()}
    flat = read_arrays(folder / "arrays", data["arrays"], shardings=shardings, hint=SPARSIFY)
    layers: dict[int, dict[str, Array]] = {}
    for name, (layer, field) in fields.items():
        layers.setdefault(layer, {})[field] = flat[name]
    found = tuple(LayerRouter(**{**_NO_NEURONS, **layers[i]}) for i in sorted(layers))
    routers = Routers(
        found, weights=str(data.get("weights", "")), importance=importance_of_routers(data, file)
    )
    check_shape(routers, config, where=folder, hint=SPARSIFY)
    check_weights(routers, weights, where=folder, hint=SPARSIFY)
    return routers


def _fields(names: Iterable[str], file: Path) -> dict[str, tuple[int, str]]:
    """Layer and field of each array of the routers; raises `CheckpointError` if these are not whole routers."""
    found = {name: re.fullmatch(r"layers\.(\d+)\.(\w+)", name) for name in names}
    fields = {name: (int(match[1]), match[2]) for name, match in found.items() if match}
    layers = {layer: {field for i, field in fields.values() if i == layer} for layer, _ in fields.values()}
    whole = all(_ALWAYS <= each <= ROUTER_AXES.keys() for each in layers.values())
    pairs = (("w_in", "w_out"), ("group_in", "group_out"))
    whole = whole and all((a in each) == (b in each) for each in layers.values() for a, b in pairs)
    if not whole or len(fields) != len(found) or sorted(layers) != list(range(len(layers))):
        raise CheckpointError("the routers' list of arrays is damaged", where=file, hint=SPARSIFY)
    return fields


def fingerprint_of_routers(folder: Path) -> str:
    """The recorded fingerprint of the routers in a folder; "" if there is none."""
    file = folder / "manifest.json"
    return str(read_part(file, (), SPARSIFY).get("fingerprint", "")) if file.is_file() else ""


def read_plans(file: Path, config: ModelConfig, weights: str, routers: Routers | None) -> PlanTable | None:
    """The plans in a model directory, checked against its parameters and routers; None if there are none."""
    if not os.path.lexists(file):
        return None
    plans = PlanTable.from_json(read_part(file, (), CALIBRATE))
    check_shape(plans, config, where=file, hint=CALIBRATE)
    check_weights(plans, weights, where=file, hint=CALIBRATE)
    if routers is not None:
        check_routers_of_plans(plans, routers.fingerprint, where=file, hint=CALIBRATE)
    return plans


def plans_alone(folder: Path) -> PlanTable | None:
    """The plans in a model directory, not checked against anything; None if there are none."""
    file = folder / PLANS
    return PlanTable.from_json(read_part(file, (), CALIBRATE)) if os.path.lexists(file) else None


def write_routers(path: str | os.PathLike[str], routers: Routers) -> None:
    """Puts trained routers into the model directory `path`, replacing earlier ones atomically.

    Plans are removed: they were calibrated for the earlier routers.

    Raises:
      CheckpointError: `path` is not a model directory.
      SparsityError: the routers are for another model, or for other weights.
    """
    folder = absolute(path)
    weights, where = str(read_manifest(folder).get("fingerprint", "")), folder / ROUTERS
    check_shape(routers, read_config(folder), where=where, hint=SPARSIFY)
    check_weights(routers, weights, where=where, hint=SPARSIFY)
    with atomic_folder(where, overwrite=True, obsolete=folder / PLANS) as temporary:
        store_routers(temporary, routers)


def write_plans(path: str | os.PathLike[str], plans: PlanTable) -> None:
    """Puts a calibrated table into the model directory `path`, replacing an earlier one atomically.

    Raises:
      CheckpointError: `path` is not a model directory.
      SparsityError: the plans are for another model, for other weights, or for other routers than the directory's.
    """
    folder = absolute(path)
    weights, where = str(read_manifest(folder).get("fingerprint", "")), folder / PLANS
    check_shape(plans, read_config(folder), where=where, hint=SPARSIFY)
    check_weights(plans, weights, where=where, hint=CALIBRATE)
    check_routers_of_plans(plans, fingerprint_of_routers(folder / ROUTERS), where=where, hint=CALIBRATE)
    with atomic_file(where, overwrite=True) as stream:
        dump_json(stream, plans.to_json())


def kept_for(
    config: ModelConfig, weights: str, routers: Routers | None, plans: PlanTable | None
) -> tuple[Routers | None, PlanTable | None]:
    """Routers and plans marked as made for the model with this fingerprint; `SparsityError` if its shape differs."""
    if routers is not None:
        routers.check(config)
        routers = dataclasses.replace(routers, weights=weights)
    if plans is not None:
        plans.check(config)
        theirs = "" if routers is None else routers.fingerprint
        plans = dataclasses.replace(plans, weights=weights, routers=theirs)
    return routers, plans


def marked(part: Any, weights: str) -> Any:
    """Routers or plans with a recorded fingerprint, with that of the loaded weights, which may have another dtype."""
    return dataclasses.replace(part, weights=weights) if part is not None and part.weights else part
