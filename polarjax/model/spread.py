"""Runs decoding steps and reads prompts on every device of the model's mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from polarjax.model.cache import KVCache
from polarjax.model.layout import Layout, axes_of
from polarjax.model.parallel import of_its_device, on_each_device, own_columns, own_numbers, own_rows
from polarjax.selection.means import mean_output
from polarjax.selection.routers import Routers
from polarjax.selection.selectors import Selector, Sparsity
from polarjax.types import Array, Bool, Float, Int


def spread_step(
    run: Callable[..., Any],
    model: Any,
    token: Int[Array, "B"],
    cache: KVCache,
    sparsity: Sparsity | None,
    live: Bool[Array, "B"] | None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """`run(model, token, cache, sparsity, live)` with each device's parts of these."""
    layout: Layout = model.layout
    rows = PartitionSpec(layout.data)
    return on_each_device(
        layout,
        run,
        (model, token, cache, for_device(sparsity, layout), live),
        specs=(
            parameter_specs(model),
            rows,
            cache_specs(cache, layout),
            sparsity_specs(sparsity, layout),
            rows,
        ),
        out=results(layout),
    )


def spread_prefill(
    run: Callable[..., Any], model: Any, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """`run(model, tokens, lengths, cache)` with each device's parts of these."""
    layout: Layout = model.layout
    rows = PartitionSpec(layout.data)
    specs = (parameter_specs(model), rows, rows, cache_specs(cache, layout))
    return on_each_device(layout, run, (model, tokens, lengths, cache), specs=specs, out=results(layout))


def spread_pieces(
    run: Callable[..., Any], model: Any, pieces: Any, cache: KVCache
) -> tuple[Float[Array, "R V"], KVCache]:
    """`run(model, pieces, cache)` with each device's parts of these."""
    layout: Layout = model.layout
    specs = (parameter_specs(model), PartitionSpec(layout.data), cache_specs(cache, layout))
    return on_each_device(layout, run, (model, pieces, cache), specs=specs, out=results(layout, whole=True))


def copy_row[T](kv: T, source: Int[Array, ""], target: Int[Array, ""], layout: Layout | None) -> T:
    """Arrays [B K S H] with row `target` replaced by row `source`; on a mesh, devices exchange this row alone."""
    if layout is None:
        return jax.tree.map(lambda leaf: leaf.at[target].set(leaf[source]), kv)
    rows, leaves = jnp.stack([source, target]), jax.tree.leaves(kv)
    spec = layout.cache_spec()

    def run(leaves: list[Array], rows: Int[Array, "2"]) -> list[Array]:
        count = leaves[0].shape[0]
        (at, to), mine = own_numbers(rows, count, whole=True)
        row = lambda leaf: of_its_device(leaf[jnp.minimum(at, count - 1)], mine[0])
        return [leaf.at[to].set(row(leaf), mode="drop") for leaf in leaves]

    made = on_each_device(
        layout, run, (leaves, rows), specs=(spec, PartitionSpec()), out=[spec] * len(leaves)
    )
    return jax.tree.unflatten(jax.tree.structure(kv), made)


def results(layout: Layout, *, whole: bool = False) -> tuple[PartitionSpec, KVCache]:
    """Where logits [B V] (`whole`: of pieces, whose results aren't divided over `data`) and a cache lie."""
    rows = PartitionSpec(layout.data)
    kv: Any = layout.cache_spec()
    return PartitionSpec(None if whole else layout.data, layout.rules["vocab"]), KVCache(kv, kv, rows)  # pyrefly: ignore[bad-argument-type]


def parameter_specs(model: Any) -> list[PartitionSpec]:
    """Where the leaves of a model lie."""
    variables = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [model.layout.spec(axes_of(each)) for each in variables]


def cache_specs(cache: KVCache, layout: Layout) -> list[PartitionSpec]:
    """Where the leaves of a cache lie."""
    kv = [layout.cache_spec()] * (len(cache.k) + len(cache.v))
    return [*kv, PartitionSpec(layout.data)]


def sparsity_specs(sparsity: Sparsity | None, layout: Layout) -> list[PartitionSpec]:
    """Where the leaves of a sparsity lie: routers with what they score, other selectors whole on every device."""
    if sparsity is None:
        return []
    if not isinstance(sparsity.routers, Routers):
        return [PartitionSpec()] * len(jax.tree.leaves(sparsity))
    named = (
        (field.name, getattr(layer, field.name))
        for layer in sparsity.routers.layers
        for field in dataclasses.fields(layer)
    )
    return [layout.router_spec(name) for name, value in named if value is not None]


def for_device(sparsity: Sparsity | None, layout: Layout) -> Sparsity | None:
    """What each device skips: the plan for its part, and a selector that scores it."""
    if sparsity is None:
        return None
    plan = sparsity.plan.for_device(neuron_parts=layout.parts("neurons"), group_parts=layout.group_parts)
    selector = sparsity.routers
    return Sparsity(selector if isinstance(selector, Routers) else PartOf(selector), plan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PartOf:
    """One device's part of what a selector scores.

    Attributes:
      selector: scores all groups and neurons.
    """

    selector: Selector

    def group_scores(self, layer, x, *, norms=None):
        """The scores of this device's groups."""
        return own_columns(own_rows(self.selector.group_scores(layer, x, norms=norms), x.shape[0]), "groups")

    def neuron_scores(self, layer, x, *, activity=None):
        """The scores of this device's neurons."""
        return own_columns(self.selector.neuron_scores(layer, x, activity=activity), "neurons")

    def mean_output(self, layer: Any) -> Float[Array, "K D"] | None:
        """What replaces this device's groups."""
        mean = mean_output(self.selector, layer)
        return None if mean is None else own_columns(mean, "groups", 0)

    def check(self, config: Any) -> None:
        """Checked before."""
