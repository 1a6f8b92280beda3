"""Samplers: frozen values that are called with logits and a key."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from polarjax.errors import InputError
from polarjax.model.ranks import ranks, values_of
from polarjax.model.vocab_parts import over_vocab
from polarjax.numeric import LARGEST, plain, shown
from polarjax.types import Array, Bool, Float, Int, Key

type Cut = Callable[[Float[Array, "B V"]], Float[Array, "B V"]]

_TINY = float(np.finfo(np.float32).tiny)


class Sampler(Protocol):
    """A hashable value that draws a token for each row; static under `jax.jit`, unless it is a pytree of arrays."""

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""] | None) -> Int[Array, "B"]:
        """Draws int32 [B]."""
        ...


@jax.tree_util.register_dataclass
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

    Each value is a number, or one number for each row of the logits. Under `jax.jit`, the values of a sampler that is an
    argument are traced, so no change of them compiles anything.

    Attributes:
      temperature: divides the logits; above 0.
      top_k: keep the k most likely tokens (ties with the k-th are kept).
      top_p: keep the smallest set of most likely tokens whose probabilities sum to at least `top_p`
        (nucleus sampling, Holtzman et al. 2020); above 0 and at most 1.

    Raises:
      InputError: a value is out of its range.
    """

    temperature: Float[Array, "*B"] | float = 1.0
    top_k: Int[Array, "*B"] | int | None = None
    top_p: Float[Array, "*B"] | float | None = None

    @classmethod
    def of_rows(cls, temperature: Any, top_k: Any, top_p: Any) -> "Categorical":
        """From arrays [B] that were checked before; a temperature of 0 takes the most likely token."""
        return _unflatten(None, (temperature, top_k, top_p))

    def __post_init__(self) -> None:
        for name, (usable, expected, optional) in _RANGES.items():
            value = _plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if isinstance(value, Tracer) or (optional and value is None):
                continue
            rows = value if isinstance(value, tuple) else (value,)
            wrong = [each for each in rows if type(each) not in (int, float) or not usable(each)]
            if wrong or not rows:
                raise InputError(
                    f"{name} is out of range",
                    where="Categorical",
                    got=shown(wrong[0] if wrong else value),
                    expected=f"{expected}, for each row" if isinstance(value, tuple) else expected,
                    hint="correct the value; Greedy() draws the most likely token",
                )

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, "*B"] | None) -> Int[Array, "B"]:
        """Draws int32 [B]. Row b uses `fold_in(key, b)`, or its own of several keys as if it were row 0 of a batch, so
        its draw does not depend on the batch. Rows with a traced temperature of 0 take the most likely token."""
        if key is None:
            raise InputError(
                "sampling needs a random key", where="Categorical", hint="pass key=jax.random.key(0)"
            )

        def draw(logits):
            keys = _row_keys(key, logits.shape[0])
            return jax.vmap(jax.random.categorical)(keys, self._cut(logits)).astype(jnp.int32)

        if not isinstance(self.temperature, jax.Array):
            return draw(logits)
        draws = _column(self, "temperature", logits) > 0
        likeliest = Greedy()(logits)
        drawn = jax.lax.cond(jnp.any(draws), draw, lambda _: likeliest, logits)
        return jnp.where(draws[:, 0] if draws.ndim else draws, drawn, likeliest)

    def _cut(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits divided by the temperature, in float32; -inf for what is cut off."""
        logits = logits.astype(jnp.float32)
        temperature = jnp.clip(_column(self, "temperature", logits), _TINY, 1 / _TINY)
        # At most 0, so it never overflows to +inf. A product with the reciprocal is what XLA makes of a division by
        # a constant: draws are the same whether the temperature is traced or not.
        logits = (logits - logits.max(-1, keepdims=True)) * (1 / temperature)
        if self.top_k is not None:
            k = _column(self, "top_k", logits)
            logits = _cut_if(k < logits.shape[1], lambda x: _keep(x, _largest(x, k)), logits)
        if not _keeps_all(self.top_p):
            p = _column(self, "top_p", logits)
            logits = _cut_if(p < 1, lambda x: _keep(x, _nucleus_floor(x, p)), logits)
        return logits


_RANGES = {
    "temperature": (lambda value: 0 < value < math.inf, "above 0", False),
    "top_k": (lambda value: type(value) is int and value > 0, "at least 1", True),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1", True),
}


def _plain(value: Any) -> Any:
    """A Python number, or a tuple of one per row; traced values unchanged."""
    if isinstance(value, jax.Array | np.ndarray) and not isinstance(value, Tracer) and value.ndim == 1:
        return tuple(jax.device_get(value).tolist())
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else plain(value)


def _host(value: Any, dtype: type) -> Any:
    """Numbers as a NumPy array in their device dtype, clipped to its range; anything else, such as a shape, as it is."""
    if not isinstance(value, int | float | tuple | np.generic | np.ndarray):
        return value
    low, high = (_TINY, 1 / _TINY) if dtype is np.float32 else (-LARGEST, LARGEST)
    return np.asarray(np.clip(np.asarray(value), low, high), dtype)


def _flatten(sampler: Categorical) -> tuple[tuple[Any, ...], None]:
    top_k = LARGEST if sampler.top_k is None else sampler.top_k
    top_p = 1.0 if sampler.top_p is None else sampler.top_p
    values = _host(sampler.temperature, np.float32), _host(top_k, np.int32), _host(top_p, np.float32)
    return values, None


def _unflatten(_: None, values: Any) -> Categorical:
    sampler = object.__new__(Categorical)
    for name, value in zip(_RANGES, values, strict=True):
        object.__setattr__(sampler, name, value)
    return sampler


def row_of(sampler: Sampler) -> tuple[float, int, float] | None:
    """Temperature (0 for the most likely token), top_k and top_p of a sampler for one row; None if it has no such."""
    if type(sampler) is Greedy:  # a subclass may draw otherwise
        return 0.0, LARGEST, 1.0
    if type(sampler) is not Categorical:
        return None
    values = _flatten(sampler)[0]
    return (
        None
        if any(isinstance(each, Tracer) or each.ndim for each in values)
        else tuple(each.item() for each in values)
    )


jax.tree_util.register_pytree_node(Categorical, _flatten, _unflatten)


def _keeps_all(top_p: Any) -> bool:
    """Whether `top_p` is known to cut nothing off."""
    return top_p is None or (type(top_p) in (int, float) and top_p >= 1)


def _row_keys(key: Key[Array, "*B"], rows: int) -> Key[Array, "B"]:
    if key.ndim and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.vmap(jax.random.fold_in, (0, None))(key, 0)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def _column(sampler: Categorical, name: str, logits: Float[Array, "B V"]) -> Array:
    """A setting as [] or [B 1]."""
    dtype = np.int32 if name == "top_k" else np.float32
    value = jnp.asarray(_host(getattr(sampler, name), dtype)).astype(dtype)
    if value.ndim and value.shape != logits.shape[:1]:
        raise InputError(
            f"{name} has another number of rows than the batch",
            where="Categorical",
            got=str(list(value.shape)),
            expected=f"a number, or [{logits.shape[0]}], one for each sequence that is made",
            hint="give every row its number, the copies of a prompt too",
        )
    return value[:, None] if value.ndim else value


def _cut_if(wanted: Bool[Array, "*B 1"], cut: Cut, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """`cut(logits)`, which isn't computed if no row wants it."""
    return over_vocab(jax.lax.cond(jnp.any(wanted), cut, lambda logits: logits, logits))


def _keep(logits: Float[Array, "B V"], floor: Float[Array, "B 1"]) -> Float[Array, "B V"]:
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _floor(logits: Float[Array, "B V"], weights: Array, needed: Array) -> Float[Array, "B 1"]:
    """The largest logit of each row such that the `weights` [B V] of the logits that reach it sum to at least `needed`
    [*B 1] and more than 0; the smallest logit if there is none.

    Finds it two bits at a time, by sums over the row: nothing is sorted.
    """
    bits, ranked = 2, ranks(logits)
    digits = jnp.arange(1, 1 << bits, dtype=jnp.uint32)[None]

    def lower(i, found, ranked, weights, needed):
        shift = jnp.uint32(32 - bits) - jnp.uint32(bits) * jnp.asarray(i, jnp.uint32)
        candidates = found | (digits << shift)
        reached = ranked[:, None, :] >= candidates[:, :, None]
        sums = jnp.sum(jnp.where(reached, weights[:, None, :], 0), -1)
        digit = jnp.sum((sums >= needed) & (sums > 0), -1, keepdims=True, dtype=jnp.uint32)
        return found | (digit << shift)

    def search(unroll: bool) -> Callable[..., Array]:
        none, steps = jnp.zeros((logits.shape[0], 1), jnp.uint32), 32 // bits
        return lambda *operands: jax.lax.fori_loop(
            0, steps, lambda i, found: lower(i, found, *operands), none, unroll=steps if unroll else 1
        )

    # With a loop in it, a step on a GPU is no longer one CUDA graph; without one, a CPU's compiler takes twice as long.
    found = jax.lax.platform_dependent(ranked, weights, needed, cuda=search(True), default=search(False))
    return values_of(jnp.maximum(found, jnp.min(ranked, -1, keepdims=True)))


def _largest(logits: Float[Array, "B V"], k: Int[Array, "*B 1"]) -> Float[Array, "B 1"]:
    """The k-th largest logit of each row, the smallest if k exceeds V; k may be traced."""
    return _floor(logits, jnp.ones(logits.shape, jnp.int32), k)


def _nucleus_floor(logits: Float[Array, "B V"], top_p: Float[Array, "*B 1"]) -> Float[Array, "B 1"]:
    """The smallest logit inside the nucleus of each row; the largest logit is 0."""
    weights = jnp.exp(logits)  # a sum above 0 is asked for because float32 rounds the smallest top_p to 0
    needed = jnp.where(top_p < 1, top_p * jnp.sum(weights, -1, keepdims=True), jnp.inf)
    return _floor(logits, weights, needed)
