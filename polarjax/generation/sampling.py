"""How the next token is drawn: frozen values, called with logits and a key."""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.errors import InputError
from polarjax.numeric import make_plain
from polarjax.types import Array, Float, Int, Key

_TINY = float(np.finfo(np.float32).tiny)


class Sampler(Protocol):
    """A hashable value that draws a token for each row; static under `jax.jit`."""

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""] | None) -> Int[Array, "B"]:
        """Draws int32 [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; the lower id on a tie. Needs no key."""

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""] | None = None) -> Int[Array, "B"]:
        """Draws int32 [B]."""
        del key
        return jnp.argmax(logits, -1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Categorical:
    """Draws from the softmax of the logits, after three optional cuts, applied in this order.

    Attributes:
      temperature: divides the logits; above 0.
      top_k: keep the k most likely tokens (ties with the k-th are kept).
      top_p: keep the smallest set of most likely tokens whose probabilities sum to at least `top_p`
        (nucleus sampling, Holtzman et al. 2020); above 0 and at most 1.

    Raises:
      InputError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        make_plain(self, "temperature", "top_k", "top_p")
        _check(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0")
        _check(
            self.top_k is None or (type(self.top_k) is int and self.top_k > 0),
            "top_k",
            self.top_k,
            "at least 1",
        )
        _check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""] | None) -> Int[Array, "B"]:
        """Draws int32 [B]; row b uses `fold_in(key, b)`, so a row's draw does not depend on the batch size."""
        if key is None:
            raise InputError(
                "sampling needs a random key", where="Categorical", hint="pass key=jax.random.key(0)"
            )
        logits = logits.astype(jnp.float32)
        temperature = min(max(self.temperature, _TINY), 1 / _TINY)  # beyond, float32 has 0 or infinity
        logits = (logits - logits.max(-1, keepdims=True)) / temperature  # below 0: never overflows to +inf
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = _keep(logits, jax.lax.top_k(logits, self.top_k)[0][:, -1:])
        if self.top_p is not None and self.top_p < 1:
            logits = _keep(logits, _nucleus_floor(logits, self.top_p))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _check(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise InputError(
            f"{name} is out of range",
            where="Categorical",
            got=repr(got),
            expected=expected,
            hint="correct the value; Greedy() draws the most likely token",
        )


def _keep(logits: Float[Array, "B V"], floor: Float[Array, "B 1"]) -> Float[Array, "B V"]:
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _nucleus_floor(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B 1"]:
    """The smallest logit inside the nucleus of each row."""
    ordered = jnp.sort(logits, -1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
    floor = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
    return jnp.minimum(floor, ordered[:, :1])  # the most likely, where float32 rounds top_p to 0
