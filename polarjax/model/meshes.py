"""Meshes with explicit axes: the compiler shards the decoder's work, so the decoder runs with auto axes."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


def auto_axes(
    function: Callable[..., Any], rows: Any, *args: Any, out: Callable[..., Any] | None = None
) -> Any:
    """Calls `function(*args)`, with explicit axes of the arguments' mesh turned into auto axes inside.

    Args:
      function: a traceable function of pytrees.
      rows: an array whose first axis is B; the results are sharded like it.
      *args: arguments of `function`.
      out: makes the results' shardings from those of arrays [B ...] and of scalars; None if all are [B ...].
    """
    mesh = next(filter(None, map(_explicit_mesh, jax.tree.leaves(args))), None)
    if mesh is None:
        return function(*args)
    spec = jax.typeof(rows).sharding.spec if isinstance(rows, jax.Array) else ()
    batch = NamedSharding(mesh, PartitionSpec(*spec[:1]))
    shardings = batch if out is None else out(batch, NamedSharding(mesh, PartitionSpec()))
    leaves, tree = jax.tree.flatten(
        args
    )  # a tree of shardings would run the constructors of the trees' classes
    run = lambda leaves: function(*jax.tree.unflatten(tree, leaves))
    return jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=shardings)(leaves)


def _explicit_mesh(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return None
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else leaf.sharding
    mesh = getattr(sharding, "mesh", None)
    return mesh if mesh is not None and mesh.explicit_axes else None


def on_any_mesh[**P, R](rows: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function of a model whose results are all [B ...]; see `auto_axes`. `rows` names an argument."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not any(map(_explicit_mesh, jax.tree.leaves((args, kwargs)))):
                return function(*args, **kwargs)
            given = dict(signature.bind(*args, **kwargs).arguments)
            arrays = {name: value for name, value in given.items() if _is_traceable(value)}
            static = {name: value for name, value in given.items() if name not in arrays}
            run = lambda arrays: function(**arrays, **static)  # pyright: ignore[reportCallIssue]
            return auto_axes(run, given[rows], arrays)

        return call

    return decorate


def _is_traceable(value: Any) -> bool:
    return all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))
