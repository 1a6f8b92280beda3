"""Random weights, routers and plans of a named shape, made on the device."""

import functools

import jax
import jax.numpy as jnp

import polarjax as pj
from bench.models import DecodeShape
from polarjax.model.parameters import abstract, parameters, with_parameters
from polarjax.selection.routers import Routers, init_routers


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    """Normal bfloat16 values with this standard deviation."""
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)


def random_model(config: pj.ModelConfig) -> pj.Decoder:
    """A model with random weights that keep activations of order one."""
    shapes, key = parameters(abstract(config, jnp.bfloat16)), jax.random.key(0)
    made = {}
    for i, (name, leaf) in enumerate(shapes.items()):
        if name.endswith("scale"):
            made[name] = jnp.ones(leaf.shape, jnp.bfloat16)
        else:
            made[name] = normal(jax.random.fold_in(key, i), leaf.shape, config.d_model**-0.5)
    return with_parameters(config, made)


def routers(config: pj.ModelConfig) -> Routers:
    """Untrained routers whose group scores differ by sequence."""
    shapes = jax.eval_shape(lambda: init_routers(config, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = [normal(key, leaf.shape, leaf.shape[0] ** -0.5) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, draw)


def random_bundle(shape: DecodeShape) -> pj.Bundle:
    """Model, routers and the published densities as plans."""
    return pj.Bundle(random_model(shape.config), routers=routers(shape.config), plans=shape.plans())
