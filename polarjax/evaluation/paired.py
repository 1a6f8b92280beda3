"""Dense and sparse side by side on the same windows, masked or decoding; what is kept are sums over each window."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.evaluation.checks import check_numbers
from polarjax.evaluation.estimates import Sums
from polarjax.evaluation.greedy_agreement import compare
from polarjax.evaluation.scoring import decoded, first_scored, masked_logits
from polarjax.evaluation.text_perplexity import token_nll
from polarjax.generation.checks import folded
from polarjax.model.decoder import Decoder
from polarjax.model.meshes import on_any_mesh
from polarjax.model.readable import fetched
from polarjax.selection.masking import Counted
from polarjax.selection.means import Importance, importance_of, mean_output
from polarjax.selection.plans import SparsityPlan
from polarjax.selection.selectors import Random, Selector, Sparsity
from polarjax.types import Array, Bool, Float, Int

LOGITS_BYTES = 1 << 30
"""Most bytes of logits, dense and sparse, that a masked batch may have."""

LARGEST_MASKED_BATCH = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """One of several selectors, by a traced number, so that all of them share a compiled program. Only for `forward`.

    They rank groups by the same importance, and all or none of them fill in mean outputs.

    Attributes:
      which: index into `selectors`, int32 scalar.
      selectors: the choices.
    """

    which: Int[Array, ""]
    selectors: tuple[Selector, ...]

    def group_scores(self, layer, x, *, norms=None):
        """The chosen selector's scores, float32."""
        return self._scores(lambda each: each.group_scores(layer, x, norms=norms))

    def neuron_scores(self, layer, x, *, activity=None):
        """The chosen selector's scores, float32."""
        return self._scores(lambda each: each.neuron_scores(layer, x, activity=activity))

    def _scores(self, score: Callable[[Selector], Float[Array, "..."]]) -> Float[Array, "..."]:
        branches = [functools.partial(_as_float32, score, each) for each in self.selectors]
        return jax.lax.switch(self.which, branches)

    @classmethod
    def of(cls, selectors: Sequence[Selector], which: int, config: ModelConfig) -> "OneOf":
        """The selector with this number, among those that can share its program."""
        kinds = [_kind(each, config) for each in selectors]
        alike = [number for number, kind in enumerate(kinds) if kind == kinds[which]]
        chosen = jax.device_put(np.int32(alike.index(which)))
        return cls(chosen, tuple(selectors[number] for number in alike))

    @property
    def importance(self) -> Importance:
        """What all of them rank groups by."""
        return importance_of(self.selectors[0])

    def mean_output(self, layer: int) -> Float[Array, "K D"] | None:
        """The chosen selector's mean outputs, float32; None for zeros."""
        found = [mean_output(each, layer) for each in self.selectors]
        means = [each.astype(jnp.float32) for each in found if each is not None]
        return jnp.stack(means)[self.which] if means else None

    def check(self, config) -> None:
        """Raises `SparsityError` if one of the selectors is for another model."""
        for each in self.selectors:
            each.check(config)


def _kind(selector: Selector, config: ModelConfig) -> tuple[Any, ...]:
    """What the program of a selector depends on: the importance, and in which layers it fills in means."""
    fills = (mean_output(selector, layer) is not None for layer in range(config.num_layers))
    return (importance_of(selector), *fills)


def _as_float32(score: Callable[[Selector], Float[Array, "..."]], selector: Selector) -> Float[Array, "..."]:
    return score(selector).astype(jnp.float32)


def paired(
    logits: tuple[Float[Array, "... V"], ...], targets: Int[Array, "..."]
) -> tuple[Array, Array, Array, Array]:
    """Dense and sparse negative log-likelihood, KL(dense ‖ sparse), and whether the most likely tokens are the same."""
    dense, sparse = logits
    same, divergence = compare(logits, targets)
    return token_nll((dense,), targets), token_nll((sparse,), targets), divergence, same


@functools.partial(jax.jit, static_argnames="context")
@on_any_mesh("tokens", lambda places: places.rows)
def _masked_pair(model: Decoder, tokens, dense, sparsity: Sparsity, *, context: int):
    """`paired` of the sparse model against given dense logits, one position after the other to save memory: the devices
    of a mesh each have some of its windows."""
    sparse = masked_logits(model, tokens, sparsity, context=context)
    targets = tokens[:, first_scored(context) :]

    def at(t: Int[Array, ""]) -> tuple[Array, Array, Array, Array]:
        column = lambda x: jax.lax.dynamic_index_in_dim(x, t, 1, keepdims=False)
        return paired((column(dense), column(sparse)), column(targets))

    columns = jax.lax.map(at, jnp.arange(targets.shape[1]))
    return tuple(each.T for each in columns)


@functools.partial(jax.jit, static_argnames="context")
@on_any_mesh("tokens", lambda places: places.sequence_logits)
def _dense_logits(model: Decoder, tokens, *, context: int):
    return masked_logits(model, tokens, None, context=context)


def masked_batch(shape: tuple[int, ...], vocab_size: int) -> int:
    """Windows per masked batch, so that the logits stay within `LOGITS_BYTES`; it changes only what `Random` draws."""
    num_windows, length = shape
    return max(1, min(num_windows, LARGEST_MASKED_BATCH, LOGITS_BYTES // (8 * length * vocab_size)))


def batches(num_windows: int, size: int) -> list[tuple[Int[np.ndarray, "size"], int]]:
    """All windows in batches of exactly `size`: the numbers of the windows of each, and how many of them count.

    A batch's windows are far apart in the text, like unrelated requests. Where windows are left over, a batch is
    filled with others that count elsewhere, so that each counts once and every batch is full.
    """
    number = -(-num_windows // size)
    found = []
    for start in range(number):
        own = np.arange(start, num_windows, number)
        others = np.setdiff1d(np.arange(num_windows), own)
        found.append((np.append(own, others[: size - len(own)]), len(own)))
    return found


class Gathered:
    """Collects the statistics of batches into sums over each window."""

    def __init__(self, scored: Bool[np.ndarray, "n after"], where: str):
        self.scored, self.where = scored, where
        self.sums = np.zeros((4, len(scored)))

    def add(self, index: Int[np.ndarray, "size"], count: int, statistics: Sequence[Any]) -> None:
        """Adds a batch's statistics, each [size after], of its first `count` windows."""
        kept = index[:count]
        counted = self.scored[kept]
        for row, values in zip(self.sums, fetched(tuple(statistics)), strict=True):
            values = np.asarray(values[:count], np.float64)
            check_numbers(values, counted, where=self.where)
            row[kept] = np.sum(values, 1, where=counted)

    def result(self) -> Sums:
        """The sums of all windows."""
        return Sums(*self.sums)


def masked_sums(
    model: Decoder,
    windows: Int[np.ndarray, "n T"],
    selectors: Sequence[Selector],
    cases: Sequence[tuple[int, SparsityPlan]],
    scored: Bool[np.ndarray, "n after"],
    *,
    context: int,
    names: Sequence[str],
    advance: Callable[..., None],
) -> list[Sums]:
    """Sums of each case, a selector's number and a plan, with the selection applied as a mask.

    The dense model runs once for all of them. All plans share a compiled program if they mask neurons in the same
    layers, and so do all selectors that rank groups by the same importance and fill in mean outputs, or don't.
    """
    plans = [plan for _, plan in cases]
    size = masked_batch(windows.shape, model.config.vocab_size)
    found = [Gathered(scored, name) for name in names]
    for number, (index, count) in enumerate(batches(len(windows), size)):
        tokens = jax.device_put(windows[index])
        dense = _dense_logits(model, tokens, context=context)
        fresh = tuple(_redrawn(each, number) for each in selectors)
        for gathered, (which, plan) in zip(found, cases, strict=True):
            variant = Counted.of(OneOf.of(fresh, which, model.config), plan, plans, model.config)
            gathered.add(index, count, _masked_pair(model, tokens, dense, variant, context=context))
            advance(count, note=gathered.where)
    return [each.result() for each in found]


def _redrawn(selector: Selector, batch: int) -> Selector:
    """A random selector with a key of its own for this batch, so that batches are independent."""
    if not isinstance(selector, Random):
        return selector
    return dataclasses.replace(selector, key=folded(selector.key, batch))


def decoded_sums(
    model: Decoder,
    windows: Int[np.ndarray, "n T"],
    variant: Sparsity,
    scored: Bool[np.ndarray, "n after"],
    *,
    batch_size: int,
    context: int,
    name: str,
    advance: Callable[..., None],
) -> Sums:
    """Sums of a variant that decodes `batch_size` windows together, as `generate` does, beside the dense model.

    Each plan, batch size and kind of selector compiles once, as in `generate`.
    """
    gathered = Gathered(scored, name)
    for index, count in batches(len(windows), batch_size):
        tokens = jax.device_put(windows[index])
        gathered.add(index, count, decoded(model, tokens, (None, variant), statistic=paired, context=context))
        advance(count, note=name)
    return gathered.result()
