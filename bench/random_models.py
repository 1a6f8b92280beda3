"""Random weights, routers and plans of a named shape, made on the device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import polarjax as pj
from bench.models import DecodeShape
from polarjax.model.parameters import abstract, parameters, with_parameters
from polarjax.selection.routers import Routers, init_routers
from polarjax.sharding import parameter_shardings


def normal(
    key: jax.Array, shape: tuple[int, ...], scale: float, where: jax.sharding.Sharding | None = None
) -> jax.Array:
    """Normal bfloat16 values with this standard deviation; with a sharding, each device makes its own part."""
    return _drawing(shape, scale, where)(key)


@functools.cache
def _drawing(shape: tuple[int, ...], scale: float, where: jax.sharding.Sharding | None) -> Any:
    draw = lambda key: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)
    return jax.jit(draw, out_shardings=where)


def random_model(config: pj.ModelConfig, layout: pj.Layout | None = None) -> pj.Decoder:
    """A model with random weights that keep activations of order one, on one device or made on those of a layout."""
    model, key, made = abstract(config, jnp.bfloat16), jax.random.key(0), {}
    places: dict[str, Any] = {} if layout is None else parameter_shardings(model, layout)
    for i, (name, leaf) in enumerate(parameters(model).items()):
        if name.endswith("scale"):
            ones = jnp.ones(leaf.shape, jnp.bfloat16)
            made[name] = ones if layout is None else jax.device_put(ones, places[name])
        else:
            key_of_it = jax.random.fold_in(key, i)
            made[name] = normal(key_of_it, leaf.shape, config.d_model**-0.5, places.get(name))
    return with_parameters(config, made, layout=layout)


def routers(config: pj.ModelConfig, layout: pj.Layout | None = None) -> Routers:
    """Untrained routers whose group scores differ by sequence."""
    shapes = jax.eval_shape(lambda: init_routers(config, jax.random.key(0)))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(shapes))))

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        where = None if layout is None else layout.sharding(layout.router_spec(path[-1].name))
        return normal(next(keys), leaf.shape, leaf.shape[0] ** -0.5, where)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_bundle(shape: DecodeShape) -> pj.Bundle:
    """Model, routers and the published densities as plans."""
    return pj.Bundle(random_model(shape.config), routers=routers(shape.config), plans=shape.plans())
