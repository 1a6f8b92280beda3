"""Results on a mesh of several processes, each of which sees only its own devices."""

import functools
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


def readable[T](tree: T) -> T:
    """The arrays as each process can read them: those that are divided over devices of several come whole to all.

    All processes call this with the same arrays; what one process alone has is left as it is.
    """
    leaves, structure = jax.tree.flatten(tree)
    spread = [i for i, leaf in enumerate(leaves) if _is_spread(leaf)]
    if spread:
        gathered = _gathering(leaves[spread[0]].sharding.mesh)([leaves[i] for i in spread])
        for i, leaf in zip(spread, gathered, strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def fetched[T](tree: T) -> T:
    """`jax.device_get` of what `readable` returns."""
    return jax.device_get(readable(tree))


def _is_spread(leaf: Any) -> bool:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    return concrete and not leaf.is_fully_addressable and not leaf.is_fully_replicated


@functools.cache
def _gathering(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh, PartitionSpec()))
