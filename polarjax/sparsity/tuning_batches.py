"""What each step of tuning reads: windows from every domain and a number of groups for each, a function of the seed."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from polarjax.configs import ModelConfig
from polarjax.selection.plans import groups_kept
from polarjax.sparsity.tune_options import TuneOptions
from polarjax.types import Int, Int32


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run; `of(step)` depends on nothing but the fields and `step`, so a run can be resumed.

    Attributes:
      domains: windows of each kind of text, int32 [n T]; every window of a batch draws a domain first.
      shares: how probable each domain is; their sum is 1.
      config: the model's configuration.
      options: the run's options.
      dense_layers: layers that always keep all groups.
      seed: of everything that is drawn.
      budgets: groups that each layer keeps instead, as in `PlanTable`; () keeps equally many in every other layer.
    """

    domains: Sequence[Int32[np.ndarray, "n T"]]
    shares: tuple[float, ...]
    config: ModelConfig
    options: TuneOptions
    dense_layers: tuple[int, ...]
    seed: int
    budgets: tuple[tuple[int, ...], ...] = ()

    @property
    def kept(self) -> tuple[int, int]:
        """The least and the most groups that a sparse window keeps: what plans keep at these densities."""
        least, most = (groups_kept(density, self.config.num_kv_heads) for density in self.options.densities)
        return least, most

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step of the optimizer sees."""
        return self.options.accumulate * self.options.batch_size * self.domains[0].shape[1]

    def of(self, step: int) -> tuple[Int32[np.ndarray, "a b T"], Int32[np.ndarray, "a L b"]]:
        """Tokens and the number of groups kept in each layer of each window."""
        drawn = np.random.default_rng([self.seed, step])
        a, b, K = self.options.accumulate, self.options.batch_size, self.config.num_kv_heads
        which = drawn.choice(len(self.domains), a * b, p=self.shares)
        rows = [self.domains[i][drawn.integers(len(self.domains[i]))] for i in which]
        least, most = self.kept
        kept = drawn.integers(least, most + 1, size=(a, b))
        kept[drawn.random((a, b)) < self.options.dense_share] = K
        return np.stack(rows).reshape(a, b, -1).astype(np.int32), self.counts(kept)

    def counts(self, kept: Int[np.ndarray, "... b"]) -> Int32[np.ndarray, "... L b"]:
        """`kept` groups in every layer but the dense ones, or as many in all as the budgets say."""
        if self.budgets:
            return np.moveaxis(np.asarray(self.budgets, np.int32)[kept - 1], -1, -2)
        counts = np.repeat(kept[..., None, :], self.config.num_layers, -2).astype(np.int32)
        counts[..., list(self.dense_layers), :] = self.config.num_kv_heads
        return counts
