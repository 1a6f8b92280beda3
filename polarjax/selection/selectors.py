"""Selection: from scores to the groups of each sequence and the neurons of the batch."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from pallas_kernels import select_top_k
from polarjax.configs import ModelConfig
from polarjax.errors import SparsityError
from polarjax.numeric import check_type
from polarjax.selection.means import Importance, filled, mean_output
from polarjax.selection.plans import SparsityPlan
from polarjax.selection.routers import Routers
from polarjax.types import Array, Bool, DTypeLike, Float, Int, Key


@runtime_checkable
class Selector(Protocol):
    """A pytree that scores groups and neurons; the largest scores are kept."""

    def group_scores(
        self, layer: int, x: Float[Array, "... D"], *, norms: Float[Array, "... K"] | None = None
    ) -> Float[Array, "... K"]:
        """Scores of the groups from the layer's attention input `x`, or from the true `norms`."""
        ...

    def neuron_scores(
        self, layer: int, x: Float[Array, "... D"], *, activity: Float[Array, "... F"] | None = None
    ) -> Float[Array, "... F"]:
        """Scores of the neurons from the layer's attention input `x`, or from their true `activity`."""
        ...

    def check(self, config: ModelConfig) -> None:
        """Raises `SparsityError` if the selector is for another model."""
        ...


def _only_masking(selector: str) -> SparsityError:
    return SparsityError(
        f"{selector} selection is for accuracy studies and cannot skip work",
        where="decode_step",
        hint="use it with forward or masked perplexity; decode with trained routers or Static",
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
    """Selects by the values that routers predict: the true group norms and neuron outputs. Only for `forward`.

    Attributes:
      means: for each layer, what replaces skipped groups, as in `LayerRouter.mean`; empty for zeros.
      importance: what ranks groups, as in `Routers`.
    """

    means: tuple[Float[Array, "K D"] | None, ...] = ()
    importance: Importance = dataclasses.field(default="norms", metadata={"static": True})

    @classmethod
    def like(cls, routers: Routers) -> "Oracle":
        """What `routers` would do if they predicted perfectly."""
        return cls(tuple(layer.mean for layer in routers.layers), routers.importance)

    def mean_output(self, layer: int) -> Float[Array, "K D"] | None:
        """What replaces the layer's skipped groups; None for zeros."""
        return self.means[layer] if self.means else None

    def group_scores(self, layer, x, *, norms=None):
        """The true norms."""
        if norms is None:
            raise _only_masking("oracle")
        return norms

    def neuron_scores(self, layer, x, *, activity=None):
        """The magnitude of each neuron's output."""
        if activity is None:
            raise _only_masking("oracle")
        return jnp.abs(activity.astype(jnp.float32))

    def check(self, config: ModelConfig) -> None:
        """Fits every model."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Random:
    """Selects at random for every layer and token: the baseline that a router must beat. Only for `forward`.

    Attributes:
      key: random key; the same key gives the same selection for the same shapes.
    """

    key: Key[Array, ""]

    def _uniform(self, layer: int, kind: int, shape: tuple[int, ...]) -> Float[Array, "..."]:
        key = jax.random.fold_in(jax.random.fold_in(self.key, layer), kind)
        return jax.random.uniform(key, shape, jnp.float32)

    def group_scores(self, layer, x, *, norms=None):
        """Uniform scores."""
        if norms is None:
            raise _only_masking("random")
        return self._uniform(layer, 0, norms.shape)

    def neuron_scores(self, layer, x, *, activity=None):
        """Uniform scores."""
        if activity is None:
            raise _only_masking("random")
        return self._uniform(layer, 1, activity.shape)

    def check(self, config: ModelConfig) -> None:
        """Fits every model."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """Selects the same groups and neurons for every token.

    Attributes:
      groups: scores [L K], for example the mean norms over a text.
      neurons: scores [L F], for example how often each neuron is active, or None.
    """

    groups: Float[Array, "L K"]
    neurons: Float[Array, "L F"] | None = None

    def group_scores(self, layer, x, *, norms=None):
        """The layer's fixed scores for every row of `x`."""
        scores = self.groups[layer]
        return jnp.broadcast_to(scores, (*x.shape[:-1], scores.shape[-1]))

    def neuron_scores(self, layer, x, *, activity=None):
        """The layer's fixed scores for every row of `x`."""
        if self.neurons is None:
            raise SparsityError(
                "this static selector has no neuron scores",
                where="Static",
                hint="pass neurons, or use a plan with dense neurons",
            )
        scores = self.neurons[layer]
        return jnp.broadcast_to(scores, (*x.shape[:-1], scores.shape[-1]))

    def check(self, config: ModelConfig) -> None:
        """Raises `SparsityError` unless the scores are [L K] for groups (and [L F] for neurons)."""
        L, K, F = config.num_layers, config.num_kv_heads, config.d_ff
        for name, scores, expected in (("groups", self.groups, (L, K)), ("neurons", self.neurons, (L, F))):
            if scores is not None and scores.shape != expected:
                raise SparsityError(
                    f"the static scores of {name} are for another model",
                    where="Static",
                    got=str(scores.shape),
                    expected=str(expected),
                    hint="compute the scores with this model",
                )


def check_scores(name: str, scores: Float[Array, "..."], expected: tuple[int, ...]) -> Float[Array, "..."]:
    """The scores in float32; raises `SparsityError` unless every row has one per group (or neuron)."""
    scores = jnp.asarray(scores).astype(jnp.float32)
    if scores.shape != expected:
        raise SparsityError(
            f"the selector returned a wrong number of {name} scores",
            where="selector",
            got=list(scores.shape),
            expected=list(expected),
            hint=f"return one score for each of the model's {expected[-1]} {name}",
        )
    return scores


def _summed(scores: Float[Array, "B n"], live: Bool[Array, "B"] | None) -> Float[Array, "1 n"]:
    """The sum over the `live` rows; NaN counts as the smallest finite score of its row, 0 if there is none."""
    least = jnp.min(jnp.where(jnp.isfinite(scores), scores, jnp.inf), -1, keepdims=True)
    scores = jnp.where(jnp.isnan(scores), jnp.where(jnp.isfinite(least), least, 0), scores)
    return jnp.sum(scores if live is None else jnp.where(live[:, None], scores, 0), 0, keepdims=True)


def top_index(
    scores: Float[Array, "B n"], k: int, shards: int = 1, order: tuple[int, ...] | None = None
) -> Int[Array, "B k"]:
    """Indices of the k / shards largest scores of each of `shards` equal blocks, ascending; ties go to the lower index.

    `order` lists the n indices in the order of the blocks; None is 0 … n - 1.
    """
    if shards == 1:
        return select_top_k(scores, k, shared=False)
    rows, width = scores.shape[0], scores.shape[1] // shards
    places = None if order is None else jnp.asarray(order, jnp.int32)
    scores = scores if places is None else scores[:, places]
    found = select_top_k(scores.reshape(rows * shards, width), k // shards, shared=False)
    first = jnp.arange(shards, dtype=jnp.int32) * width
    index = (found.reshape(rows, shards, -1) + first[None, :, None]).reshape(rows, k)
    return index if places is None else jnp.sort(places[index], -1)


def _top_shared(scores: Float[Array, "B F"], k: int, shards: int) -> Int[Array, "k"]:
    """`top_index` of the sum of positive scores over the rows."""
    blocks, width = jnp.split(scores, shards, 1), scores.shape[1] // shards
    found = [select_top_k(block, k // shards, shared=True) + i * width for i, block in enumerate(blocks)]
    return found[0] if shards == 1 else jnp.concatenate(found)


def top_mask(
    scores: Float[Array, "... n"], k: int, shards: int = 1, order: tuple[int, ...] | None = None
) -> Bool[Array, "... n"]:
    """True at the scores that `top_index` finds in each row."""
    rows = scores.reshape(-1, scores.shape[-1])
    index = top_index(rows, k, shards, order)
    mask = jnp.zeros(rows.shape, bool).at[jnp.arange(rows.shape[0])[:, None], index].set(True)
    return mask.reshape(scores.shape)


_PLAN = "pass pj.Sparsity(routers, plan), or bundle.sparsity(batch_size)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sparsity:
    """What to skip: a selector (traced) and a plan (static). Pass it to `forward`, `decode_step` or `generate`.

    Attributes:
      routers: any `Selector`: trained `Routers`, `Oracle()`, `Random(key)` or `Static(scores)`.
      plan: how many neurons and groups each layer keeps.
    """

    routers: Selector
    plan: SparsityPlan = dataclasses.field(metadata={"static": True})

    def check(self, config: ModelConfig) -> None:
        """Raises `SparsityError` unless both parts fit a model of this configuration."""
        check_type(self.plan, SparsityPlan, where="sparsity", hint=_PLAN, error=SparsityError)
        if isinstance(self.routers, type) or not isinstance(self.routers, Selector):
            raise SparsityError(
                "not a selector",
                where="sparsity",
                got=type(self.routers).__name__,
                expected="Routers, or another Selector",
                hint="pass bundle.routers, once they are trained",
            )
        self.plan.check(config)
        self.routers.check(config)

    def group_mask(
        self, layer: int, x: Float[Array, "... D"], norms: Float[Array, "... K"]
    ) -> Bool[Array, "... K"] | None:
        """The groups kept at each token, or None if the layer is dense."""
        k = self.plan.groups[layer]
        if k is None:
            return None
        scores = self.routers.group_scores(layer, x, norms=norms)
        scores = check_scores("groups", scores, norms.shape)
        return top_mask(scores, k, self.plan.group_shards, self.plan.order(layer))

    def fill(
        self, layer: int, kept: Bool[Array, "... K"] | None, dtype: DTypeLike
    ) -> Float[Array, "... D"] | None:
        """What replaces the skipped groups' part of the layer's output; None for zeros."""
        return filled(mean_output(self.routers, layer), kept, dtype)

    @jax.named_scope("routers")
    def fill_unread(
        self, layer: int, index: Int[Array, "B k"] | None, dtype: DTypeLike
    ) -> Float[Array, "B D"] | None:
        """`fill` for the groups that aren't in `index`, as `group_index` returns it."""
        mean = mean_output(self.routers, layer)
        if mean is None or index is None:
            return None
        kept = jnp.zeros((index.shape[0], mean.shape[0]), bool)
        return filled(mean, kept.at[jnp.arange(index.shape[0])[:, None], index].set(True), dtype)

    @jax.named_scope("routers")
    def group_index(
        self, layer: int, x: Float[Array, "B D"], config: ModelConfig
    ) -> Int[Array, "B k"] | None:
        """The groups kept for each sequence of a decoding step, ascending, or None if the layer is dense."""
        k = self.plan.groups[layer]
        if k is None:
            return None
        scores = self.routers.group_scores(layer, x)
        scores = check_scores("groups", scores, (x.shape[0], config.num_kv_heads))
        return top_index(scores, k, self.plan.group_shards, self.plan.order(layer))

    def neuron_mask(
        self, layer: int, x: Float[Array, "... D"], activity: Float[Array, "... F"]
    ) -> Bool[Array, "... F"] | None:
        """The neurons kept at each token, or None if the layer is dense."""
        k = self.plan.neurons[layer]
        if k is None:
            return None
        scores = self.routers.neuron_scores(layer, x, activity=activity)
        return top_mask(check_scores("neurons", scores, activity.shape), k, self.plan.neuron_shards)

    @jax.named_scope("routers")
    def neuron_index(
        self, layer: int, x: Float[Array, "B D"], config: ModelConfig, live: Bool[Array, "B"] | None = None
    ) -> Int[Array, "k"] | None:
        """The neurons kept for the `live` rows of a decoding step, ascending, or None if the layer is dense.

        These have the largest scores, summed over these rows.
        """
        k = self.plan.neurons[layer]
        if k is None:
            return None
        scores = self.routers.neuron_scores(layer, x)
        scores = check_scores("neurons", scores, (x.shape[0], config.d_ff))
        if not isinstance(
            self.routers, Routers
        ):  # only routers' scores are above 0, as `shared=True` requires
            return top_index(_summed(scores, live), k, self.plan.neuron_shards)[0]
        counted = scores > 0 if live is None else (scores > 0) & live[:, None]  # false for NaN too
        return _top_shared(jnp.where(counted, scores, 0), k, self.plan.neuron_shards)
