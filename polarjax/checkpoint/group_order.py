"""Puts a model's groups into the order in which its plans assign them to devices."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from polarjax.checkpoint.bundle import Bundle
from polarjax.model.layout import ROUTER_AXES, Layout
from polarjax.model.parameters import fingerprint, parameters, with_parameters
from polarjax.selection.routers import LayerRouter
from polarjax.sharding import automatic, logical_axes
from polarjax.types import Array


def in_group_order(bundle: Bundle, layout: Layout) -> Bundle:
    """The bundle, on its mesh, with every layer's groups in the order of the plans, whose order is then the model's.

    Nothing changes unless devices divide the groups and the plans assign groups to so many devices. Its logits stay the
    same but for rounding.
    """
    plans, model = bundle.plans, bundle.model
    if (
        plans is None
        or not plans.order
        or layout.group_parts == 1
        or plans.group_shards != layout.group_parts
    ):
        return bundle
    axes, flat = logical_axes(model), parameters(model)
    for name, value in flat.items():
        if "groups" in axes[name]:
            order = plans.order[int(name.split(".")[1])]
            flat[name] = _reordered(value, axes[name].index("groups"), order)
    model = with_parameters(model.config, flat, layout=layout)
    weights, routers = fingerprint(model), bundle.routers
    if routers is not None:
        layers = tuple(map(_router, routers.layers, plans.order))
        routers = dataclasses.replace(routers, layers=layers, weights=weights)
    recorded = plans.routers and ("" if routers is None else routers.fingerprint)
    plans = dataclasses.replace(plans, order=(), weights=weights, routers=recorded)
    return dataclasses.replace(bundle, model=model, routers=routers, plans=plans, weights=weights)


def _router(router: LayerRouter, order: Sequence[int]) -> LayerRouter:
    values = {name: getattr(router, name) for name, axes in ROUTER_AXES.items() if "groups" in axes}
    changed = {
        name: _reordered(value, ROUTER_AXES[name].index("groups"), order)
        for name, value in values.items()
        if value is not None
    }
    return dataclasses.replace(router, **changed)


def _reordered(value: Array, axis: int, order: Sequence[int]) -> Array:
    """The array with its groups in this order, where it was."""
    place = value.sharding
    if not isinstance(place, NamedSharding):
        return jnp.take(value, jnp.asarray(order), axis)
    mesh = automatic(place.mesh)  # pyrefly: ignore[bad-argument-type]
    auto = NamedSharding(mesh, place.spec)
    with jax.set_mesh(mesh):  # instead of the caller's, which may have explicit axes
        made = _taken(jax.device_put(value, auto), np.asarray(order), axis=axis, place=auto)
    # Programs of several devices that overlap may wait for each other for ever, if a CPU has few threads.
    return jax.block_until_ready(jax.device_put(made, place))


@functools.partial(jax.jit, static_argnames=("axis", "place"))
def _taken(value: Array, order: Array, *, axis: int, place: NamedSharding) -> Array:
    """One program for all arrays of a shape."""
    return jax.lax.with_sharding_constraint(jnp.take(value, order, axis), place)
