"""Places a model's parameters and routers on a mesh, by the logical names of their axes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from polarjax.errors import InputError
from polarjax.model.decoder import Decoder
from polarjax.model.layout import RULES, Layout, axes_of
from polarjax.model.layout_checks import check_mesh
from polarjax.model.mesh_shape import DIVIDED, Attention, MeshShape
from polarjax.model.parameters import parameters, with_parameters
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.types import Array


def logical_axes(model: Decoder) -> dict[str, tuple[str, ...]]:
    """The logical name of every axis of every parameter, by dotted path; `model` may be abstract.

    Names: vocab, positions, table (a narrower embedding), embed, neurons, groups, queries, head.
    """
    variables = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return {name: axes_of(leaf) for name, leaf in zip(parameters(model), variables, strict=True)}


def parameter_shardings(model: Decoder, layout: Layout) -> dict[str, jax.sharding.NamedSharding]:
    """Where every parameter lies, by dotted path; `model` may be abstract.

    Raises:
      InputError: the mesh doesn't divide the model.
    """
    layout.check(model.config)
    return {name: layout.sharding(layout.spec(axes)) for name, axes in logical_axes(model).items()}


def automatic(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh with automatic axes: XLA divides the work."""
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def place(value: Array, sharding: jax.sharding.NamedSharding) -> Array:
    """The array on a mesh; where that has devices of other processes, every process fills its own."""
    spread = isinstance(value, jax.Array) and not value.is_fully_addressable
    if sharding.is_fully_addressable or spread:
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def place_model(model: Decoder, layout: Layout) -> Decoder:
    """The model on the mesh of `layout`; parameters that are there already aren't copied."""
    shardings = parameter_shardings(model, layout)
    flat = {name: place(value, shardings[name]) for name, value in parameters(model).items()}
    return with_parameters(model.config, flat, layout=layout)


def place_routers(routers: Routers, layout: Layout) -> Routers:
    """The routers on the mesh of `layout`, each with the groups or neurons that it scores."""

    def placed(router: LayerRouter) -> LayerRouter:
        put = lambda name, value: place(value, layout.sharding(layout.router_spec(name)))
        fields = ((field.name, getattr(router, field.name)) for field in dataclasses.fields(router))
        return dataclasses.replace(router, **{name: put(name, a) for name, a in fields if a is not None})

    return dataclasses.replace(routers, layers=tuple(map(placed, routers.layers)))


def attention_for(plans: PlanTable | None, devices: int) -> str:
    """How attention is divided if nobody says: as the plans were made, otherwise by groups.

    By groups, a step has no exchange but its sums, and sequences needn't be a multiple of the devices; on two H200s it
    was faster for every shape, batch and plan that was measured (bench/results/decode_mesh.jsonl).
    """
    made_for_sequences = plans is not None and plans.neuron_shards == devices > 1 == plans.group_shards
    return "sequences" if made_for_sequences else "groups"


def layout_for(
    mesh: jax.sharding.Mesh,
    plans: PlanTable | None,
    *,
    rules: Mapping[str, str | None] | None = None,
    attention: Attention | None = None,
) -> Layout:
    """The layout on `mesh` of a model with these plans; see `shard`."""
    check_mesh(mesh)
    found: Any = attention_for(plans, mesh.shape["model"]) if attention is None else attention
    return Layout(_usable(mesh), RULES if rules is None else rules, found)


def _usable(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The mesh with automatic axes, so that what is done with its arrays needs no shardings of its own; as it is, where
    the caller works on a mesh that `jax.set_mesh` has set."""
    if jax.sharding.get_abstract_mesh().axis_names:
        return mesh
    return automatic(mesh)


def described_mesh(text: str, *, where: str) -> dict[str, Any]:
    """The `mesh` and `rules` of `load` that "data=2,model=4,vocab=whole" describes, of the first devices.

    Raises:
      InputError: it describes no mesh, or there are too few devices.
    """
    shape, devices = MeshShape.parse(text, where=where), jax.devices()
    if shape.devices > len(devices):
        raise InputError(
            "more devices than there are",
            where=where,
            got=f"{shape.devices} (data={shape.data}, model={shape.model})",
            expected=f"at most {len(devices)}",
            hint="make the mesh smaller; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 devices",
        )
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(
        (shape.data, shape.model), ("data", "model"), axis_types=axes, devices=devices[: shape.devices]
    )
    return {"mesh": mesh, "rules": {axis: None for axis in DIVIDED if axis not in shape.divided} or None}
