"""A model as a flat pytree, for programs that are called many times."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from polarjax.model.decoder import Decoder


class _Structure:
    """A tree's structure; equal only to itself, so that comparing it takes no time."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree


_structure = functools.cache(_Structure)


@jax.tree_util.register_pytree_node_class
class Flat:
    """A model as a flat pytree: a call doesn't spend a millisecond on finding its arrays."""

    def __init__(self, model: Decoder) -> None:
        leaves, tree = jax.tree.flatten(model)
        self.leaves, self.structure = tuple(leaves), _structure(tree)

    @property
    def model(self) -> Decoder:
        """The model with these arrays."""
        return jax.tree.unflatten(self.structure.tree, self.leaves)

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Structure]:
        """The arrays, and the structure."""
        return self.leaves, self.structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, leaves: Iterable[Any]) -> "Flat":
        """The inverse of `tree_flatten`."""
        made = object.__new__(cls)
        made.leaves, made.structure = tuple(leaves), structure
        return made


def of_flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(model, …)` with a flat model in its place."""

    @functools.wraps(function)
    def call(model: Flat, *args: Any, **kwargs: Any) -> Any:
        return function(model.model, *args, **kwargs)

    return call
