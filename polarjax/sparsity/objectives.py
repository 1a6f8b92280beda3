"""What the two kinds of router learn: their weights, scores, labels, loss and measure of success."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from polarjax.model.taps import unpack
from polarjax.selection.routers import LayerRouter, score_groups, score_neurons
from polarjax.selection.selectors import top_mask
from polarjax.sparsity.activations import Target
from polarjax.sparsity.options import Objective
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
    record: ClassVar[Target] = "activity"
    fields: ClassVar[tuple[str, ...]] = ("w_in", "w_out")
    criterion: ClassVar[str] = "f1"

    def scores(self, weights: Weights, x: Float[Array, "b D"]) -> Float[Array, "b F"]:
        """Logits, by the function that decoding uses."""
        return score_neurons(x, weights["w_in"], weights["w_out"])

    def labels(self, packed: UInt8[Array, "b bytes"]) -> Bool[Array, "b F"]:
        """Whether each neuron's pre-activation exceeded the activation's threshold."""
        return unpack(packed, self.num_neurons)

    def loss(self, scores: Float[Array, "b F"], packed: UInt8[Array, "b bytes"]) -> Float[Array, ""]:
        """Cross-entropy with the published weights: a positive counts 1, a negative `mean(label) + 0.005`."""
        label = self.labels(packed).astype(jnp.float32)
        return _weighted_entropy(scores, label, jnp.mean(label) + 0.005)

    def value(self, packed: UInt8[Array, "b bytes"]) -> Float[Array, "b F"]:
        """The value of keeping each neuron: 1 if active, else 0."""
        return self.labels(packed).astype(jnp.float32)

    def predicted(self, scores: Float[Array, "b F"]) -> Bool[Array, "b F"]:
        """Neurons predicted to be active."""
        return scores >= 0

    def chosen(self, scores: Float[Array, "b F"]) -> Bool[Array, "b F"]:
        """Neurons selected without a plan's k: those predicted to be active."""
        return scores >= 0


@dataclasses.dataclass(frozen=True)
class GroupTask:
    """Predict which groups are the most important. Static under `jax.jit`.

    Attributes:
      kept: number of groups per token that are positive, and that are selected.
      objective: "importance" predicts each group's share of the token's importance (`share_loss`), which works for
        any number of groups; "top" predicts whether it is among the `kept` most important, as published.
    """

    kept: int
    objective: Objective = "importance"
    name: ClassVar[str] = "groups"
    record: ClassVar[Target] = "norms"
    fields: ClassVar[tuple[str, ...]] = ("w_group", "b_group")

    @property
    def criterion(self) -> str:
        """The measure that picks the best epoch: the fraction of positives selected, or of their squared importance."""
        return "selected" if self.objective == "top" else "captured"

    def scores(self, weights: Weights, x: Float[Array, "b D"]) -> Float[Array, "b K"]:
        """Logits, by the function that decoding uses."""
        return score_groups(x, weights["w_group"], weights["b_group"])

    def labels(self, norms: Float[Array, "b K"]) -> Bool[Array, "b K"]:
        """Whether each group is among the `kept` largest of its token."""
        return top_mask(norms, self.kept)

    def loss(self, scores: Float[Array, "b K"], norms: Float[Array, "b K"]) -> Float[Array, ""]:
        """`share_loss`, or cross-entropy with the published weights (a positive counts 1, a negative `mean(label)`)."""
        if self.objective == "importance":
            return share_loss(scores, norms)
        label = self.labels(norms).astype(jnp.float32)
        return _weighted_entropy(scores, label, jnp.mean(label))

    def value(self, norms: Float[Array, "b K"]) -> Float[Array, "b K"]:
        """The value of keeping each group: its squared importance."""
        return jnp.square(norms)

    def predicted(self, scores: Float[Array, "b K"]) -> Bool[Array, "b K"]:
        """Groups predicted to be positive: by the sign of the logit, or the selected ones if importance is predicted."""
        return scores >= 0 if self.objective == "top" else self.chosen(scores)

    def chosen(self, scores: Float[Array, "b K"]) -> Bool[Array, "b K"]:
        """The groups that decoding would select."""
        return top_mask(scores, self.kept)


def share_loss(scores: Float[Array, "... K"], importance: Float[Array, "... K"]) -> Float[Array, ""]:
    """Mean KL(shares ‖ softmax(scores)) over tokens, where shares are each group's part of the token's importance.

    A listwise ranking loss (ListNet, Cao et al. 2007): only differences within a token count, whatever its size, and
    they carry over to other text better than those of a squared error.
    """
    total = jnp.sum(importance, -1, keepdims=True)
    shares = importance / jnp.maximum(total, 1e-20)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    return jnp.mean(jnp.sum(shares * (logs - jax.nn.log_softmax(scores, -1)), -1))


type Task = NeuronTask | GroupTask


def weights_of(task: Task, router: LayerRouter) -> Weights:
    """The leaves of `router` that the task trains."""
    return {name: getattr(router, name) for name in task.fields}


def loss(task: Task, weights: Weights, x: Float[Array, "b D"], record: Num[Array, "b n"]) -> Float[Array, ""]:
    """The task's mean loss of a minibatch."""
    return task.loss(task.scores(weights, x), record)


def _weighted_entropy(
    scores: Float[Array, "b n"], label: Float[Array, "b n"], negative: Float[Array, ""]
) -> Float[Array, ""]:
    """Mean binary cross-entropy; a positive counts 1, a negative `negative`."""
    entropy = optax.sigmoid_binary_cross_entropy(scores, label)
    return jnp.mean(entropy * jnp.where(label > 0, 1.0, negative))


def count(
    task: Task, weights: Weights, x: Float[Array, "b D"], record: Num[Array, "b n"], real: Bool[Array, "b"]
) -> Counts:
    """Counts over the `real` rows, from which `Quality` is computed: positives, predicted positives, true
    positives, positives among the chosen, and the total value of the positives and of the chosen."""
    scores = task.scores(weights, x)
    label = task.labels(record) & real[:, None]
    predicted = task.predicted(scores) & real[:, None]
    total = lambda mask: jnp.sum(mask, dtype=jnp.float32)
    chosen = task.chosen(scores) & real[:, None]
    value = task.value(record)
    return {
        "positive": total(label),
        "predicted": total(predicted),
        "right": total(predicted & label),
        "found": total(chosen & label),
        "reachable": total(jnp.where(label, value, 0)),
        "captured": total(jnp.where(chosen, value, 0)),
    }
