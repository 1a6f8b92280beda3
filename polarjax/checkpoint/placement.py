"""`shard`: places a model, or all of a bundle, on a mesh of devices."""

import dataclasses
from collections.abc import Mapping

import jax

from polarjax.checkpoint.bundle import Bundle
from polarjax.checkpoint.group_order import in_group_order
from polarjax.checkpoint.same_model import agree_on_mesh
from polarjax.model.checks import check_model
from polarjax.model.decoder import Decoder
from polarjax.model.mesh_shape import Attention
from polarjax.sharding import layout_for, place_model, place_routers


def shard[T: (Bundle, Decoder)](
    bundle: T,
    mesh: jax.sharding.Mesh,
    *,
    rules: Mapping[str, str | None] | None = None,
    attention: Attention | None = None,
) -> T:
    """Places a model on many devices; everything that takes a model then runs on all of them.

    Neurons, groups and the vocabulary are divided over the mesh axis `model`; sequences over `data`.

    Args:
      bundle: a bundle, or a model alone.
      mesh: devices with the axis `model` and, if wanted, `data`, such as `jax.make_mesh((2, 4), ("data", "model"))`.
        Explicit axes count as automatic ones, unless `jax.set_mesh` has set a mesh.
      rules: mesh axis ("model" or None) of the logical axes vocab, neurons and groups, where it isn't "model".
      attention: "groups": each device attends with its own groups; "sequences": with all groups, for its own sequences.
        None takes what the plans were made for, otherwise "groups".

    Returns:
      the same with its arrays on the mesh. Groups are in the order of the plans, if these assign them to devices.

    Raises:
      InputError: not a mesh with these axes, a rule that can't be followed, or groups, neurons or a vocabulary that the
        mesh doesn't divide.
    """
    if not isinstance(bundle, Bundle):
        check_model(bundle, where="shard")
        layout = layout_for(mesh, None, rules=rules, attention=attention)
        agree_on_mesh(mesh, layout.attention, bundle)
        return place_model(bundle, layout)  # pyrefly: ignore[bad-return]
    layout = layout_for(mesh, bundle.plans, rules=rules, attention=attention)
    agree_on_mesh(mesh, layout.attention, bundle.model)
    model = place_model(bundle.model, layout)
    routers = None if bundle.routers is None else place_routers(bundle.routers, layout)
    return in_group_order(dataclasses.replace(bundle, model=model, routers=routers), layout)  # pyrefly: ignore[bad-return]
