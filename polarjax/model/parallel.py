"""One device's part of the work on a mesh: runs a function on every device, and what its parts exchange inside."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import Link, connect
from polarjax.model.layout import Layout
from polarjax.types import Array, Float, Implementation, Int

_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


def on_each_device(
    layout: Layout, function: Callable[..., Any], args: tuple[Any, ...], *, specs: tuple[Any, ...], out: Any
) -> Any:
    """`function(*args)` with each device's parts of the arguments; inside, this module's functions exchange parts.

    Args:
      layout: the mesh, and how the model lies on it.
      function: a traceable function.
      args: pytrees of arrays.
      specs: for each argument, the `PartitionSpec`s of its leaves as a list, or one for all of them.
      out: those of the results: a tree that is a prefix of theirs.
    """
    flat = [jax.tree.flatten(each) for each in args]
    places = [
        list(spec) if isinstance(spec, list) else [spec] * len(leaves)
        for spec, (leaves, _) in zip(specs, flat, strict=True)
    ]

    def run(parts):
        found = [jax.tree.unflatten(tree, leaves) for leaves, (_, tree) in zip(parts, flat, strict=True)]
        with _inside(layout):
            return function(*found)

    around = jax.sharding.get_abstract_mesh()  # of `jax.set_mesh`, or with explicit axes turned automatic
    mesh = None if around.axis_names else layout.mesh
    spread = jax.shard_map(run, mesh=mesh, in_specs=(places,), out_specs=out, check_vma=False)
    return spread([leaves for leaves, _ in flat])


@contextlib.contextmanager
def _inside(layout: Layout) -> Iterator[None]:
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def own_layout() -> Layout | None:
    """The layout of the mesh of whose devices this is one's part of the work; None outside of `on_each_device`."""
    return _LAYOUT.get()


def _divided(axis: str) -> Layout | None:
    """The layout, if this is one device's part of arrays whose logical `axis` is divided; else None."""
    layout = _LAYOUT.get()
    return layout if layout is not None and layout.parts(axis) > 1 else None


def is_divided(axis: str) -> bool:
    """Whether each device has a part of arrays with this logical axis."""
    return _divided(axis) is not None


def _by_sequences() -> Layout | None:
    layout = _divided("groups")
    return layout if layout is not None and layout.attention == "sequences" else None


def summed(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """The sum over all devices of what each computed with its part of the logical `axis`."""
    return x if _divided(axis) is None else jax.lax.psum(x, "model")


def linked(token: Int[Array, "B"], width: int, implementation: Implementation) -> Link | None:
    """What the devices need to sum [B width] in a kernel, after `token` is known; None where XLA must sum."""
    layout = _LAYOUT.get()
    if layout is None or not (is_divided("groups") or is_divided("neurons")):
        return None
    try:
        sizes = {"rows": token.shape[0], "width": width}
        return connect(token, layout.mesh, "model", implementation=implementation, **sizes)
    except NotImplementedError:
        return None


def over_data(layout: Layout | None, x: Array) -> Array:
    """An array [B ...] whose rows XLA divides over the mesh axis `data`, where it divides the work: outside of
    `on_each_device`."""
    if layout is None or layout.data is None or _LAYOUT.get() is not None or x.shape[0] % layout.sizes.data:
        return x
    return constrained(layout, x, PartitionSpec(layout.data))


def constrained(layout: Layout, x: Array, spec: PartitionSpec) -> Array:
    """The array, laid out like this."""
    around = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, spec if around.axis_names else layout.sharding(spec))


def table_rows(table: Float[Array, "V E"], ids: Int[Array, "..."]) -> Float[Array, "... E"]:
    """Rows of the token table, of which each device has a part."""
    if _divided("vocab") is None:
        return table[ids]
    count = table.shape[0]
    own = ids - jax.lax.axis_index("model") * count
    mine = (own >= 0) & (own < count)
    return summed(jnp.where(mine[..., None], table[jnp.clip(own, 0, count - 1)], 0), "vocab")


def own_columns(x: Float[Array, "... n"], axis: str, dimension: int = -1) -> Float[Array, "... m"]:
    """This device's part of an array that is whole, along one dimension that the logical `axis` divides."""
    layout = _divided(axis)
    if layout is None or (axis == "groups" and layout.attention == "sequences"):
        return x
    return _part(x, jax.lax.axis_index("model"), layout.sizes.model, dimension)


def own_rows(x: Array, count: int) -> Array:
    """This device's `count` rows of an array of all sequences [B ...]; an array of so many rows as it is."""
    layout = _LAYOUT.get()
    if layout is None or x.shape[0] == count:
        return x
    names = tuple(filter(None, (layout.data, "model" if layout.attention == "sequences" else None)))
    return _part(x, jax.lax.axis_index(names), x.shape[0] // count, 0)


def own_sequences(x: Any) -> Any:
    """The rows of arrays [B ...] of a data shard that this device attends for; None stays None."""
    layout = _by_sequences()
    if layout is None:
        return x
    index = jax.lax.axis_index("model")
    return jax.tree.map(lambda leaf: _part(leaf, index, layout.sizes.model, 0), x)


def at_own_sequences(part: Float[Array, "b D"] | None) -> Float[Array, "B D"] | None:
    """The inverse of `own_sequences`: zeros in the rows of other devices."""
    layout = _by_sequences()
    if layout is None or part is None:
        return part
    rows = part.shape[0]
    none = jnp.zeros((rows * layout.sizes.model, *part.shape[1:]), part.dtype)
    start = jax.lax.axis_index("model") * rows
    return jax.lax.dynamic_update_slice_in_dim(none, part, start, 0)


def to_sequences(*parts: Float[Array, "B K H"], dimension: int = 1) -> tuple[Float[Array, "b K H"], ...]:
    """Keys, values and the like of all sequences and this device's groups -> of its sequences and all groups.

    One exchange, if attention is divided by sequences; otherwise nothing. `dimension` is that of the groups; those
    after it but the last are treated as one.
    """
    if _by_sequences() is None:
        return parts
    flat = [x.reshape(*x.shape[: dimension + 1], -1, x.shape[-1]) for x in parts]
    widths = [x.shape[dimension + 1] for x in flat]
    both = jnp.concatenate(flat, dimension + 1)
    both = jax.lax.all_to_all(both, "model", 0, dimension, tiled=True)
    split = jnp.split(both, [sum(widths[:i]) for i in range(1, len(widths))], dimension + 1)
    head = both.shape[: dimension + 1]
    return tuple(x.reshape(*head, *old.shape[dimension + 1 :]) for x, old in zip(split, parts, strict=True))


def to_groups(heads: Float[Array, "b K G H"]) -> Float[Array, "B K G H"]:
    """The inverse of `to_sequences` for the heads."""
    if _by_sequences() is None:
        return heads
    return jax.lax.all_to_all(heads, "model", 1, 0, tiled=True)


def of_all_groups(x: Float[Array, "R T K *H"]) -> Float[Array, "R T K *H"]:
    """The array of all groups on every device, if attention is divided by sequences."""
    return x if _by_sequences() is None else jax.lax.all_gather(x, "model", axis=2, tiled=True)


def of_own_groups(heads: Float[Array, "R T K G H"], mine: Any) -> Float[Array, "R T K G H"]:
    """This device's groups of heads, each row of which one device (where it is `mine`) has computed for all groups."""
    if _by_sequences() is None:
        return heads
    heads = jnp.where(jnp.expand_dims(mine, range(1, heads.ndim)), heads, 0)
    return jax.lax.psum_scatter(heads, "model", scatter_dimension=2, tiled=True)


def of_all_shards(x: Float[Array, "r D"]) -> Float[Array, "R D"]:
    """The rows of all data shards, in order, on all of them."""
    layout = _LAYOUT.get()
    return x if layout is None or layout.data is None else jax.lax.all_gather(x, layout.data, tiled=True)


def of_its_device(row: Float[Array, "..."], mine: Any) -> Float[Array, "..."]:
    """A row of the cache on every device that has some of its groups: the one where it is `mine` has it."""
    layout = _LAYOUT.get()
    names = () if layout is None else tuple(filter(None, (layout.data, _by_sequences() and "model")))
    return jax.lax.psum(jnp.where(mine, row, 0), names) if names else row


def own_numbers(
    rows: Int[Array, "R"], count: int, *, whole: bool, shard: bool = False
) -> tuple[Int[Array, "R"], Any]:
    """Numbers of rows among this device's `count` rows of the cache, `count` for those of others; and which are its own.

    Args:
      rows: numbers among those of the data shard or, if `whole`, of all shards.
      count: rows that this device has or, with `shard`, that its data shard has.
      whole: whether the numbers are among all rows.
      shard: whether to number the rows of the data shard.
    """
    layout = _LAYOUT.get()
    if layout is None:
        return rows, None
    first, most = 0, count
    if _by_sequences() is not None and not shard:
        first, most = jax.lax.axis_index("model") * count, count * layout.sizes.model
    if whole and layout.data is not None:
        first += jax.lax.axis_index(layout.data) * most
    own = rows - first
    mine = (own >= 0) & (own < count)
    return jnp.where(mine, own, count), mine


def _part(x: Array, index: Any, parts: int, dimension: int) -> Array:
    size = x.shape[dimension] // parts
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, dimension)
