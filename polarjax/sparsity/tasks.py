"""What the two kinds of router learn: their weights, scores, labels, loss and measure of success."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import optax

from polarjax.sparsity.activations import Record
from polarjax.sparsity.router import LayerRouter, score_groups, score_neurons
from polarjax.sparsity.select import top_mask
from polarjax.sparsity.taps import unpack
from polarjax.types import Array, Bool, Float, Num, UInt8

type Weights = dict[str, Array]
type Counts = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class NeuronTask:
    """Predict which neurons are active. Static under `jax.jit`.

    Attributes:
      num_neurons: F.
    """

    num_neurons: int
    name: ClassVar[str] = "neurons"
    record: ClassVar[Record] = "activity"
    fields: ClassVar[tuple[str, ...]] = ("w_in", "w_out")
    criterion: ClassVar[str] = "f1"

    def scores(self, weights: Weights, x: Float[Array, "b D"]) -> Float[Array, "b F"]:
        """Logits, by the function that decoding uses."""
        return score_neurons(x, weights["w_in"], weights["w_out"])

    def labels(self, packed: UInt8[Array, "b bytes"]) -> Bool[Array, "b F"]:
        """Whether each neuron's pre-activation was positive."""
        return unpack(packed, self.num_neurons)

    def importance(self, label: Float[Array, "b F"], packed: UInt8[Array, "b bytes"]) -> Float[Array, "b F"]:
        """Published weights: a positive counts 1, a negative `mean(label) + 0.005`."""
        return jnp.where(label > 0, 1.0, jnp.mean(label) + 0.005)

    def chosen(self, scores: Float[Array, "b F"]) -> Bool[Array, "b F"]:
        """The neurons predicted as active."""
        return scores >= 0


@dataclasses.dataclass(frozen=True)
class GroupTask:
    """Predict which groups have the largest norms. Static under `jax.jit`.

    Attributes:
      kept: how many groups of each token are positive, and are selected.
    """

    kept: int
    name: ClassVar[str] = "groups"
    record: ClassVar[Record] = "norms"
    fields: ClassVar[tuple[str, ...]] = ("w_group", "b_group")
    criterion: ClassVar[str] = "selected"

    def scores(self, weights: Weights, x: Float[Array, "b D"]) -> Float[Array, "b K"]:
        """Logits, by the function that decoding uses."""
        return score_groups(x, weights["w_group"], weights["b_group"])

    def labels(self, norms: Float[Array, "b K"]) -> Bool[Array, "b K"]:
        """Whether each group is among the `kept` largest of its token."""
        return top_mask(norms, self.kept)

    def importance(self, label: Float[Array, "b K"], norms: Float[Array, "b K"]) -> Float[Array, "b K"]:
        """Published weights: a positive counts 1, a negative `mean(label)`."""
        return jnp.where(label > 0, 1.0, jnp.mean(label))

    def chosen(self, scores: Float[Array, "b K"]) -> Bool[Array, "b K"]:
        """The groups that decoding would select."""
        return top_mask(scores, self.kept)


type Task = NeuronTask | GroupTask


def weights_of(task: Task, router: LayerRouter) -> Weights:
    """The leaves of `router` that the task trains."""
    return {name: getattr(router, name) for name in task.fields}


def loss(task: Task, weights: Weights, x: Float[Array, "b D"], record: Num[Array, "b n"]) -> Float[Array, ""]:
    """Mean binary cross-entropy of a minibatch, each entry weighted by the task's `importance`."""
    label = task.labels(record).astype(jnp.float32)
    entropy = optax.sigmoid_binary_cross_entropy(task.scores(weights, x), label)
    return jnp.mean(entropy * task.importance(label, record))


def count(
    task: Task, weights: Weights, x: Float[Array, "b D"], record: Num[Array, "b n"], real: Bool[Array, "b"]
) -> Counts:
    """Over the `real` rows: positives, those with a logit of at least 0, the right ones among these, and the
    positives among what is chosen."""
    scores = task.scores(weights, x)
    label = task.labels(record) & real[:, None]
    said = (scores >= 0) & real[:, None]
    total = lambda mask: jnp.sum(mask, dtype=jnp.float32)
    chosen = task.chosen(scores)
    return {
        "positive": total(label),
        "said": total(said),
        "right": total(said & label),
        "found": total(chosen & label),
    }
