"""Meshes with explicit axes: the compiler shards the decoder's work, so the decoder runs with auto axes."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polarjax.model.cache import KVCache
from polarjax.model.layout import Layout
from polarjax.model.vocab_parts import vocab_divided


class Places(NamedTuple):
    """Where results of a model lie on a mesh with explicit axes.

    Attributes:
      rows: arrays [B ...].
      scalar: arrays without B.
      logits: arrays [B V].
      sequence_logits: arrays [B T V].
      kv: keys and values [B K S H].
    """

    rows: NamedSharding
    scalar: NamedSharding
    logits: NamedSharding
    sequence_logits: NamedSharding
    kv: NamedSharding

    @property
    def cache(self) -> KVCache:
        """Where a cache lies."""
        kv: Any = self.kv
        return KVCache(kv, kv, self.rows)  # pyrefly: ignore[bad-argument-type]


def _places(mesh: Any, rows: Any, layout: Layout | None) -> Places:
    at = lambda *axes: NamedSharding(mesh, PartitionSpec(*map(functools.partial(_explicit, mesh), axes)))
    if layout is None:
        spec = jax.typeof(rows).sharding.spec if isinstance(rows, jax.Array) else ()
        batch = at(*spec[:1])
        return Places(batch, at(), batch, batch, batch)
    data = layout.data if rows.shape[0] % layout.sizes.data == 0 else None
    vocab = layout.rules["vocab"]
    return Places(at(data), at(), at(data, vocab), at(data, None, vocab), at(*layout.cache_spec()))


def _explicit(mesh: Any, axes: Any) -> Any:
    """Those of a dimension's mesh axes that are explicit; XLA places the others."""
    if isinstance(axes, tuple):
        return tuple(name for name in axes if name in mesh.explicit_axes)
    return axes if axes in mesh.explicit_axes else None


@contextmanager
def without_mesh() -> Iterator[None]:
    """Leaves the mesh that the caller has set, for work of many programs: its arrays lie where the model does, as arrays
    of automatic axes."""
    if not jax.sharding.get_abstract_mesh().axis_names:
        yield
        return
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        yield


def auto_axes(
    function: Callable[..., Any],
    rows: Any,
    *args: Any,
    layout: Layout | None = None,
    out: Callable[[Places], Any] = lambda places: places.rows,
) -> Any:
    """Calls `function(*args)`, with explicit axes of the arguments' mesh turned into auto axes inside, where functions
    of logits know how `layout` divides the vocabulary.

    Args:
      function: a traceable function of pytrees.
      rows: an array whose first axis is B; without a layout, the results are sharded like it.
      *args: arguments of `function`.
      layout: of the model.
      out: the results' shardings, a prefix of their tree.
    """
    mesh = _explicit_mesh(args)
    with vocab_divided(layout):
        if mesh is None:
            return function(*args)
        # A tree of shardings would run the constructors of the trees' classes.
        leaves, tree = jax.tree.flatten(args)
        run = lambda leaves: function(*jax.tree.unflatten(tree, leaves))
        shardings = out(_places(mesh, rows, layout))
        return jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=shardings)(leaves)


def _explicit_mesh(args: Any) -> Any:
    """The mesh with explicit axes that `jax.set_mesh` has set, otherwise that of one of the arrays; None without."""
    around = jax.sharding.get_abstract_mesh()
    if around.explicit_axes:
        return around
    return next(filter(None, map(_explicit_mesh_of, jax.tree.leaves(args))), None)


def _explicit_mesh_of(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return None
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else leaf.sharding
    mesh = getattr(sharding, "mesh", None)
    return mesh if mesh is not None and mesh.explicit_axes else None


def on_any_mesh[**P, R](
    rows: str, out: Callable[[Places], Any]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function of a `model`; see `auto_axes`. `rows` names an argument."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _explicit_mesh((args, kwargs)) is None:
                return function(*args, **kwargs)
            given = dict(signature.bind(*args, **kwargs).arguments)
            arrays = {name: value for name, value in given.items() if _is_traceable(value)}
            static = {name: value for name, value in given.items() if name not in arrays}
            run = lambda arrays: function(**arrays, **static)  # pyrefly: ignore[invalid-param-spec]
            layout = getattr(given["model"], "layout", None)
            return auto_axes(run, given[rows], arrays, layout=layout, out=out)

        return call

    return decorate


def _is_traceable(value: Any) -> bool:
    return all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))
