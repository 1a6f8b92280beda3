"""Checks that plans and batches fit the mesh that a model lies on."""

import contextlib
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh

from polarjax.errors import InputError, SparsityError
from polarjax.model.layout import Layout
from polarjax.selection.plans import SparsityPlan


def check_spread(model: Any, sparsity: Any) -> None:
    """Raises `SparsityError` if a plan is for another number of shards than those of the mesh that the model is on."""
    layout: Layout | None = model.layout
    if layout is None or sparsity is None:
        return
    plan: SparsityPlan = sparsity.plan
    for name, counts, shards, parts in (
        ("neurons", plan.neurons, plan.neuron_shards, layout.parts("neurons")),
        ("groups", plan.groups, plan.group_shards, layout.group_parts),
        ("batch", plan.neurons, plan.batch_shards, layout.sizes.data),
    ):
        by_sequences = name == "groups" and layout.attention == "sequences" and layout.sizes.model > 1
        needed = name == "batch" or parts > 1 or by_sequences  # a device that has all can follow any plan
        if any(count is not None for count in counts) and shards != parts and needed:
            _refuse(name, shards, parts, layout)
    if plan.group_order and layout.group_parts > 1:
        raise SparsityError(
            "the plan assigns groups to devices, but the model's groups are in their own order",
            where="sparsity plan",
            hint="shard the bundle that has the plans: pj.shard(bundle, mesh); then use bundle.sparsity",
        )


def check_around(model: Any) -> None:
    """Raises `InputError` if the caller works on a mesh that the model can't run on: it lies on another, or must stay on
    one device."""
    around = jax.sharding.get_abstract_mesh()
    if around.empty:
        return
    if model.layout is not None:
        _check_own_mesh(around, model.layout.mesh)
        return
    if around.size == 1:
        return
    arrays = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
    placed = [leaf for leaf in arrays if not isinstance(leaf, Tracer) and leaf.committed]
    if any(len(leaf.sharding.device_set) == 1 for leaf in placed):
        raise InputError(
            "the model is on one device, but jax.set_mesh has set several",
            where="model",
            got=f"a mesh of {around.size} devices",
            hint="place the model there with pj.shard(bundle, mesh), or call this outside of jax.set_mesh",
        )


def _check_own_mesh(around: Any, mesh: Mesh) -> None:
    """Raises `InputError` unless the mesh `around` a call has the sizes and the devices of the model's."""
    if around.manual_axes:
        raise InputError(
            "a model on a mesh divides its work itself",
            where="model",
            got="a call inside of jax.shard_map",
            hint="call this outside of jax.shard_map",
        )
    same = around.size == mesh.size and all(around.shape.get(name) == n for name, n in mesh.shape.items())
    with contextlib.suppress(ValueError):  # while a function is traced, only the sizes are known
        same = same and set(jax.sharding.get_mesh().devices.flat) == set(mesh.devices.flat)
    if not same:
        raise InputError(
            "the model is on another mesh than jax.set_mesh has set",
            where="model",
            got=_sizes(around) if _sizes(around) != _sizes(mesh) else "one of other devices",
            expected=_sizes(mesh),
            hint="place the model there with pj.shard(bundle, mesh), or call this outside of jax.set_mesh",
        )


def _sizes(mesh: Any) -> str:
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items())


def _refuse(name: str, shards: int, parts: int, layout: Layout) -> None:
    attention = " --attention sequences" if layout.attention == "sequences" else ""
    plans = "make plans for this mesh: polarjax sparsify MODEL --text FILE --shards"
    hints = {
        "batch": f"use bundle.sparsity(batch_size), or SparsityPlan(..., batch_shards={parts})",
        "neurons": f"{plans} {parts}{attention}",
        "groups": f"{plans} {layout.sizes.model}{attention}",
    }
    of = {"batch": "the mesh axis data", "neurons": "the mesh axis model", "groups": "the mesh axis model"}
    if name == "groups":
        of["groups"] += f", attention by {layout.attention}"
    raise SparsityError(
        "the plan is for another number of shards",
        where="sparsity plan",
        got=f"{name} in {shards}",
        expected=f"{parts} ({of[name]})",
        hint=hints[name],
    )


def check_batch(model: Any, sparsity: Any, batch_size: int, *, where: str = "decode_step") -> None:
    """Raises `InputError` unless a batch can be divided over the model's mesh, or into the parts of the plan."""
    if model.layout is not None:
        model.layout.sizes.rows(batch_size, where=where)
    parts = 1 if sparsity is None else sparsity.plan.batch_shards
    if isinstance(batch_size, int) and batch_size % parts:
        raise InputError(
            "the plan divides the batch into parts, which would not be equal",
            where=where,
            got=f"{batch_size} sequences, {parts} parts",
            expected=f"a multiple of {parts}",
            hint=f"use {-(-batch_size // parts) * parts}",
        )
