"""Training tokens in minibatches, from memory or from disk."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from polarjax.sparsity.activations import Activations
from polarjax.sparsity.objectives import Task
from polarjax.types import Array, Float, Int, Num


class Cut(NamedTuple):
    """How training tokens are cut: `pieces` of `steps` minibatches of `batch` tokens, and the tokens of a piece."""

    batch: int
    pieces: int
    steps: int
    tokens: int

    @classmethod
    def of(cls, rows: int, batch: int, row_bytes: int, memory_bytes: int) -> "Cut":
        """As few pieces as fit in memory; the only one holds all tokens."""
        batch = min(batch, rows)
        most = max(batch, memory_bytes // row_bytes)
        pieces = min(-(-rows // most), rows // batch)
        steps = rows // pieces // batch
        return cls(batch, pieces, steps, rows if pieces == 1 else steps * batch)


class Feed:
    """Yields the training tokens, in a new order each epoch, in pieces that fit in memory.

    All pieces have the same shape; a single piece stays on the device.
    """

    def __init__(
        self, activations: Activations, task: Task, rows: np.ndarray, *, batch: int, memory_bytes: int
    ):
        self._activations, self._task, self._rows = activations, task, rows
        one = sum(array.nbytes for array in self._read(rows[:1]))
        cut = Cut.of(len(rows), batch, one, memory_bytes)
        self.batch, self.pieces, self.steps = cut.batch, cut.pieces, cut.steps
        self._resident = jax.device_put(self._read(rows)) if self.pieces == 1 else None

    def epoch(self, order: np.random.Generator) -> Iterator[tuple[Array, Array, Int[np.ndarray, "steps b"]]]:
        """Yields router inputs [L m D], records [L m n], and the rows of each step [steps b]."""
        places = order.permutation(len(self._rows))
        size = self.steps * self.batch
        for piece in range(self.pieces):
            if self._resident is not None:
                yield *self._resident, places[:size].reshape(self.steps, self.batch)
            else:
                chosen = np.sort(places[piece * size : (piece + 1) * size])
                index = order.permutation(len(chosen)).reshape(-1, self.batch)
                yield *jax.device_put(self._read(self._rows[chosen])), index

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return read(self._activations, self._task, rows)


def read(
    activations: Activations, task: Task, rows: np.ndarray
) -> tuple[Float[np.ndarray, "L m D"], Num[np.ndarray, "L m n"]]:
    """Router inputs at `rows`, and the records that the task's labels are computed from."""
    return activations.router_inputs(rows), activations.records(task.record, rows)
