"""Checks that plans and batches fit the mesh that a model lies on."""

from typing import Any

import jax
from jax.core import Tracer

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
        needed = name != "groups" or parts > 1 or layout.attention == "sequences"
        if any(count is not None for count in counts) and shards != parts and needed:
            _refuse(name, shards, parts, layout)
    if plan.group_order and layout.group_parts > 1:
        raise SparsityError(
            "the plan assigns groups to devices, but the model's groups are in their own order",
            where="sparsity plan",
            hint="shard the bundle that has the plans: pj.shard(bundle, mesh); then use bundle.sparsity",
        )


def check_around(model: Any) -> None:
    """Raises `InputError` if a model whose arrays must stay on one device would run on a mesh."""
    around = jax.sharding.get_abstract_mesh()
    if model.layout is not None or around.empty or around.size == 1:
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
