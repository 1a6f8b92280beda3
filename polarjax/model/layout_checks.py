"""Checks of a mesh, and of the rules that lay a model out over it."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from polarjax.errors import InputError
from polarjax.numeric import shown

AXES = ("data", "model")
SPLITTABLE = ("vocab", "neurons", "groups")
LOGICAL = (*SPLITTABLE, "positions", "table", "embed", "queries", "head")

_MESH = 'make one with jax.make_mesh((1, n), ("data", "model"))'


def check_mesh(mesh: Any) -> None:
    """Raises `InputError` unless this is a mesh of devices with an axis `model`, and no other than `data`."""
    if not isinstance(mesh, Mesh):
        raise InputError(
            "not a mesh of devices",
            where="mesh",
            got=type(mesh).__name__,
            expected="a jax.sharding.Mesh",
            hint=_MESH,
        )
    other = [name for name in mesh.axis_names if name not in AXES]
    if other or "model" not in mesh.axis_names:
        raise InputError(
            f"the mesh has an axis {other[0]!r}" if other else "the mesh has no axis model",
            where="mesh",
            got=", ".join(f"{name}={size}" for name, size in mesh.shape.items()),
            expected="the axis model, and data if wanted",
            hint=_MESH,
        )
    if len(set(mesh.devices.flat)) < mesh.size:
        raise InputError(
            "a device is in the mesh twice",
            where="mesh",
            got=f"{len(set(mesh.devices.flat))} devices in {mesh.size} places",
            hint=_MESH,
        )


def check_rules(rules: Any) -> dict[str, str | None]:
    """Rules as a dictionary; raises `InputError` unless they send logical axes to mesh axes that can take them."""
    try:
        found = dict(rules)
    except (TypeError, ValueError):
        raise InputError(
            "not rules",
            where="rules",
            got=shown(rules),
            expected="a mapping from logical axes to mesh axes",
            hint='pass for example {"vocab": None}',
        ) from None
    for name, axis in found.items():
        if name not in LOGICAL:
            raise InputError(
                f"parameters have no axis {name!r}",
                where="rules",
                got=shown(found),
                expected=" | ".join(LOGICAL),
                hint="use these names",
            )
        usable = ("model", None) if name in SPLITTABLE else (None,)
        if axis not in usable:
            raise InputError(
                f"the axis {name!r} can't be divided over the mesh axis {axis!r}",
                where="rules",
                got=shown(axis),
                expected=" | ".join(repr(each) for each in usable),
                hint=f"divide {', '.join(SPLITTABLE)} over the mesh axis model; the others stay whole",
            )
    return found


def check_sequences(attention: str, rules: Mapping[str, str | None]) -> None:
    """Raises `InputError` if attention is divided by sequences although the projections are not divided by groups."""
    if attention == "sequences" and rules["groups"] is None:
        raise InputError(
            "attention can't be divided by sequences where the groups' projections are whole",
            where="rules",
            got='{"groups": None}',
            expected='"groups" over the mesh axis model',
            hint='leave "groups" out of the rules, or use attention="groups"',
        )


def check_no_mesh(**given: Any) -> None:
    """Raises `InputError` if something is given that needs a mesh."""
    for name, value in given.items():
        if value is not None:
            raise InputError(
                f"{name} needs a mesh", where=name, got=shown(value), hint="pass mesh too, or leave it out"
            )
