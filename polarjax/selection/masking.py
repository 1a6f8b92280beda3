"""Masks with a traced number of kept groups: one compiled program for every density."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.selection.means import Importance, filled, mean_output
from polarjax.selection.plans import SparsityPlan
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.selection.selectors import Selector, Sparsity, check_scores
from polarjax.types import Array, Bool, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
    """Like `Sparsity`, for groups alone and with traced counts. Only for forward passes that mask.

    Attributes:
      routers: any `Selector`.
      counts: groups kept in each layer of each row, int32 [L B]; K keeps all.
    """

    routers: Selector
    counts: Int[Array, "L B"]

    def group_mask(
        self, layer: Any, x: Float[Array, "B T D"], norms: Float[Array, "B T K"]
    ) -> Bool[Array, "B T K"]:
        """The groups kept at each token."""
        return self._kept(layer, self._scores(layer, x, norms))

    def _scores(
        self, layer: Any, x: Float[Array, "B T D"], norms: Float[Array, "B T K"]
    ) -> Float[Array, "B T K"]:
        return check_scores("groups", self.routers.group_scores(layer, x, norms=norms), norms.shape)

    def _kept(self, layer: Any, scores: Float[Array, "B T K"]) -> Bool[Array, "B T K"]:
        return _rank(scores) < self.counts[layer][:, None, None]

    def neuron_mask(self, layer: Any, x: Any, activity: Any) -> None:
        """None: MLPs are dense."""

    def fill(self, layer: Any, kept: Array, dtype: DTypeLike) -> Float[Array, "B T D"] | None:
        """What replaces the skipped groups' part of the layer's output; None for zeros."""
        return filled(mean_output(self.routers, layer), kept, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Gating(Masking):
    """A `Masking` from whose choices routers learn: its masks are 0 or 1, float32, and pass gradients to the scores.

    The gradient of a mask is that of sigmoid(score - threshold) (a straight-through estimator, Bengio et al. 2013). The
    threshold lies between the last group kept and the first one skipped, and moves with the scores so that as much is
    kept as before. So a group whose part would have helped gains score, and another loses as much. The states that the
    routers read get no gradient.
    """

    def group_mask(self, layer, x, norms):
        """As `Masking.group_mask`, float32."""
        scores = self._scores(layer, jax.lax.stop_gradient(x), norms)
        kept = self._kept(layer, scores)
        return kept + _change(scores, kept)


def _change(scores: Float[Array, "... K"], kept: Bool[Array, "... K"]) -> Float[Array, "... K"]:
    """0; its gradient is that of the soft mask which `Gating` describes, and 0 where nothing is skipped."""
    fixed = jax.lax.stop_gradient(scores)
    last = jnp.min(jnp.where(kept, fixed, jnp.inf), -1, keepdims=True)
    first = jnp.max(jnp.where(kept, -jnp.inf, fixed), -1, keepdims=True)
    soft = jax.nn.sigmoid(fixed - (last + first) / 2)
    slope = soft * (1 - soft)
    change = scores - fixed
    total = lambda values: jnp.sum(values, -1, keepdims=True)
    of_threshold = total(slope * change) / jnp.maximum(total(slope), 1e-20)
    return slope * (change - of_threshold)


def _rank(scores: Float[Array, "... K"]) -> Int[Array, "... K"]:
    """The place of each score in descending order; ties go to the lower index, as in `select_top_k`.

    By comparing each score with the others, which is one kernel on a GPU, where sorting a few numbers for each token
    takes many.
    """
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    own, other = scores[..., :, None], scores[..., None, :]
    earlier = np.tri(scores.shape[-1], k=-1, dtype=bool)  # whether the other has a lower index
    tied = (other == own) & jnp.broadcast_to(earlier, (*scores.shape, scores.shape[-1]))
    return jnp.sum((other > own) | tied, -1, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Counted(Sparsity):
    """A `Sparsity` with traced counts, so that plans share a compiled program. Only for `forward`.

    Its plan says which layers skip anything; the counts there mean nothing.

    Attributes:
      neurons, groups: how many each layer keeps, int32 [L].
    """

    neurons: Int[Array, "L"]
    groups: Int[Array, "L"]

    @classmethod
    def of(
        cls, routers: Selector, plan: SparsityPlan, others: Sequence[SparsityPlan], config: ModelConfig
    ) -> "Counted":
        """What `plan` keeps; shares its program with those of the `others` that mask neurons in the same layers."""
        counts = lambda kept, most: jax.device_put(
            np.array([most if k is None else k for k in kept], np.int32)
        )
        dense = [
            all(k is None for k in column) for column in zip(*(each.groups for each in others), strict=True)
        ]
        which = dataclasses.replace(
            plan,
            neurons=tuple(None if k is None else plan.neuron_shards for k in plan.neurons),
            groups=tuple(None if nothing else plan.group_shards for nothing in dense),
        )
        return cls(
            routers, which, counts(plan.neurons, config.d_ff), counts(plan.groups, config.num_kv_heads)
        )

    def group_mask(self, layer, x, norms):
        """As `Sparsity.group_mask`."""
        if self.plan.groups[layer] is None:
            return None
        scores = self.routers.group_scores(layer, x, norms=norms)
        scores, plan = check_scores("groups", scores, norms.shape), self.plan
        return top_counted(scores, self.groups[layer], plan.group_shards, plan.order(layer))

    def neuron_mask(self, layer, x, activity):
        """As `Sparsity.neuron_mask`."""
        if self.plan.neurons[layer] is None:
            return None
        scores = self.routers.neuron_scores(layer, x, activity=activity)
        scores = check_scores("neurons", scores, activity.shape)
        return top_counted(scores, self.neurons[layer], self.plan.neuron_shards)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AfterPrompts(Sparsity):
    """A `Sparsity` for the tokens after each row's prompt; the prompt is dense, as generation reads it. Only for
    `forward`, whose logits are then those of generation, where neurons are chosen for one sequence.

    Attributes:
      prompts: tokens of each row's prompt, int32 [B].
    """

    prompts: Int[Array, "B"]

    @classmethod
    def of(cls, sparsity: Sparsity, prompts: Int[Array, "B"]) -> "AfterPrompts":
        """`sparsity` after these prompts."""
        return cls(sparsity.routers, sparsity.plan, prompts)

    def group_mask(self, layer, x, norms):
        """As `Sparsity.group_mask`."""
        return self._or_prompt(super().group_mask(layer, x, norms))

    def neuron_mask(self, layer, x, activity):
        """As `Sparsity.neuron_mask`."""
        return self._or_prompt(super().neuron_mask(layer, x, activity))

    def _or_prompt(self, kept: Bool[Array, "B T n"] | None) -> Bool[Array, "B T n"] | None:
        if kept is None:
            return None
        position = jnp.arange(kept.shape[1], dtype=jnp.int32)
        return kept | (position[None] < self.prompts[:, None])[..., None]


def top_counted(
    scores: Float[Array, "... n"], k: Int[Array, ""], shards: int = 1, order: tuple[int, ...] | None = None
) -> Bool[Array, "... n"]:
    """`top_mask` with a traced k, from 1 to n."""
    if shards > 1:
        places = np.arange(scores.shape[-1]) if order is None else np.asarray(order)
        blocks = scores[..., places].reshape(*scores.shape[:-1], shards, -1)
        return top_counted(blocks, k // shards).reshape(scores.shape)[..., np.argsort(places)]
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    least = jnp.take(jnp.sort(scores, axis=-1), jnp.asarray([scores.shape[-1] - k]), axis=-1)
    above, equal = scores > least, scores == least
    room = k - jnp.sum(above, -1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, -1, dtype=jnp.int32) <= room))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StackedRouters:
    """Routers whose layers are stacked, so that a layer can be a traced number.

    Attributes:
      layers: one `LayerRouter` with arrays [L ...].
      importance: as in `Routers`.
    """

    layers: LayerRouter
    importance: Importance = dataclasses.field(default="norms", metadata={"static": True})

    @classmethod
    def of(cls, routers: Routers) -> "StackedRouters":
        """Stacks the layers."""
        return cls(jax.tree.map(lambda *leaves: jnp.stack(leaves), *routers.layers), routers.importance)

    def unstacked(self, weights: str = "") -> Routers:
        """The routers with one entry a layer."""
        count = self.layers.w_group.shape[0]
        layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], self.layers) for i in range(count))
        return Routers(layers, weights, self.importance)

    def _one(self, layer: Any) -> Routers:
        return Routers((jax.tree.map(lambda leaf: leaf[layer], self.layers),), "", self.importance)

    def group_scores(self, layer, x, *, norms=None):
        """As `Routers.group_scores`."""
        return self._one(layer).group_scores(0, x, norms=norms)

    def neuron_scores(self, layer, x, *, activity=None):
        """As `Routers.neuron_scores`."""
        return self._one(layer).neuron_scores(0, x, activity=activity)

    def mean_output(self, layer: Any) -> Float[Array, "K D"] | None:
        """As `Routers.mean_output`."""
        return None if self.layers.mean is None else self.layers.mean[layer]

    def check(self, config: ModelConfig) -> None:
        """Raises `SparsityError` unless these routers fit a model of this configuration."""
        self.unstacked().check(config)
