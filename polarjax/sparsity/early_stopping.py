"""Keeps the best weights of each layer while all layers train at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.sparsity.objectives import Task, Weights
from polarjax.types import Array


@dataclasses.dataclass
class Best:
    """Each layer's best weights so far; a finished layer keeps them.

    Attributes:
      weights: stacked [L …].
      measure: validation measure of those weights [L].
      epoch: epoch they come from [L].
      done: whether each layer has stopped [L].
    """

    weights: Weights
    measure: np.ndarray
    epoch: np.ndarray
    done: np.ndarray

    @classmethod
    def start(cls, weights: Weights) -> "Best":
        """The state before the first epoch, which any measure improves on."""
        layers = next(iter(weights.values())).shape[0]
        return cls(weights, np.full(layers, -1.0), np.zeros(layers, int), np.zeros(layers, bool))

    def update(
        self, weights: Weights, measured: np.ndarray, epoch: int, *, patience: int, good_enough: float
    ) -> "Best":
        """The state after an epoch: keeps improvements, and stops layers that are good enough or no longer improve."""
        better = ~self.done & (measured > self.measure)
        at = np.where(better, epoch, self.epoch)
        value = np.where(better, measured, self.measure)
        done = self.done | (value > good_enough) | (epoch - at >= patience)
        return Best(_where(better, weights, self.weights), value, at, done)

    def note(self, task: Task) -> str:
        """The progress bar's note."""
        done = f", {self.done.sum()}/{len(self.done)} layers done" if self.done.any() else ""
        return f"{task.criterion} {self.measure.mean():.3f} (least {self.measure.min():.3f}){done}"


@jax.jit
def _where(better: Array, new: Weights, old: Weights) -> Weights:
    pick = lambda a, b: jnp.where(jnp.expand_dims(better, range(1, a.ndim)), a, b)
    return jax.tree.map(pick, new, old)
