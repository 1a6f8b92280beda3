"""Means over a text with standard errors, from sums over windows."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from polarjax.types import Float, Int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its standard error.

    Attributes:
      value: the figure.
      standard_error: of the value, with windows as the independent units; NaN if there is only one.
    """

    value: float
    standard_error: float

    def exp(self) -> "Estimate":
        """e to the value, its error to first order; infinity if a float can't hold it."""
        try:
            grown = math.exp(self.value)
        except OverflowError:
            return Estimate(math.inf, math.nan)
        return Estimate(grown, grown * self.standard_error)

    def scaled(self, factor: float) -> "Estimate":
        """The value and its error times a positive number."""
        return Estimate(self.value * factor, self.standard_error * factor)

    def to_json(self) -> dict[str, float | None]:
        """Both numbers; null instead of NaN and infinity."""
        return {name: finite(value) for name, value in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


def finite(value: float) -> float | None:
    """The number for JSON, which has no NaN and infinity."""
    return value if math.isfinite(value) else None


def ratio(sums: Float[np.ndarray, "n"], counts: Int[np.ndarray, "n"]) -> Estimate:
    """Total of `sums` over total of `counts`, such as nats per token.

    Tokens of a window depend on each other, so the windows are the units: the error comes from how much each
    window's sum differs from the mean's prediction for its count. Windows with nothing to count are left out.

    Args:
      sums: one sum a window, float64.
      counts: what is averaged over in each window: its tokens, bytes or words.
    """
    used = np.asarray(counts) > 0
    number, total = int(used.sum()), float(np.sum(counts))
    if not number:
        return Estimate(math.nan, math.nan)
    mean = float(np.sum(sums)) / total
    if number == 1 or not math.isfinite(mean):
        return Estimate(mean, math.nan)
    residuals = (np.asarray(sums, np.float64) - mean * counts)[used]
    return Estimate(mean, math.sqrt(number / (number - 1) * float(np.sum(residuals**2))) / total)


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """How much of the text each window scores.

    Attributes:
      tokens, bytes, words: scored in each window, int64 [n]; bytes and words are None if only ids are known.
    """

    tokens: Int[np.ndarray, "n"]
    bytes: Int[np.ndarray, "n"] | None = None
    words: Int[np.ndarray, "n"] | None = None

    def totals(self) -> dict[str, int | None]:
        """The sum over all windows of each."""
        return {name: None if each is None else int(each.sum()) for name, each in self._named().items()}

    def each(self, statistic: Callable[[Int[np.ndarray, "n"]], Estimate]) -> dict[str, Estimate]:
        """A statistic of the counts of each unit that is known: "token", "byte", "word"."""
        named = self._named().items()
        return {name.removesuffix("s"): statistic(counts) for name, counts in named if counts is not None}

    def _named(self) -> dict[str, Int[np.ndarray, "n"] | None]:
        return {"tokens": self.tokens, "bytes": self.bytes, "words": self.words}


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the scored tokens of each window, float64 [n].

    Attributes:
      dense, sparse: negative log-likelihood of the text under both models, in nats.
      kl: KL(dense ‖ sparse) in nats.
      same: tokens where both models' most likely next token is the same.
    """

    dense: Float[np.ndarray, "n"]
    sparse: Float[np.ndarray, "n"]
    kl: Float[np.ndarray, "n"]
    same: Float[np.ndarray, "n"]


def perplexities(nll: Float[np.ndarray, "n"], units: Units) -> dict[str, Any]:
    """Nats per token, perplexity per token, byte and word, and bits per byte, each with its error, as JSON."""
    found: dict[str, Any] = {"nll": ratio(nll, units.tokens)}
    found["perplexity"] = units.each(lambda counts: ratio(nll, counts).exp())
    if units.bytes is not None:
        found["bits_per_byte"] = ratio(nll, units.bytes).scaled(1 / math.log(2))
    return found


def differences(sums: Sums, units: Units) -> dict[str, Any]:
    """What sparsity changes on the same windows, each with the error of the *paired* difference.

    `nll`: nats per token more than dense; `increase`: relative increase of perplexity per token, byte and word
    (.05 is 5 %); `perplexity`: the difference of the perplexities per token.
    """
    more = sums.sparse - sums.dense
    grown = units.each(lambda counts: ratio(more, counts).exp())
    dense, sparse = (ratio(each, units.tokens).exp().value for each in (sums.dense, sums.sparse))
    with np.errstate(invalid="ignore", over="ignore"):
        weighted = (
            sparse * sums.sparse - dense * sums.dense
        )  # the change to first order in each window's sums
        spread = ratio(weighted, units.tokens).standard_error
    return {
        "nll": ratio(more, units.tokens),
        "increase": {name: Estimate(each.value - 1, each.standard_error) for name, each in grown.items()},
        "perplexity": Estimate(sparse - dense, spread),
    }
