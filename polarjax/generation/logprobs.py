"""Log-probabilities of the tokens that were generated, and of the likeliest ones."""

import dataclasses

import jax
import jax.numpy as jnp

from polarjax.model.vocab_parts import largest
from polarjax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LogProbs:
    """Natural logarithms of the model's probabilities, before temperature, cuts and penalties.

    Attributes:
      chosen: of each token, float32 [B M]; 0 beyond a row's length.
      ids: the n likeliest tokens at each position, the likeliest first, int32 [B M n].
      best: their log-probabilities, float32 [B M n].
    """

    chosen: Float[Array, "B *M"]
    ids: Int[Array, "B *M n"]
    best: Float[Array, "B *M n"]


def log_probs(
    logits: Float[Array, "B V"], token: Int[Array, "B"], live: Bool[Array, "B"], n: int
) -> LogProbs:
    """Those of one token in each `live` row and of the n likeliest; zeros in the other rows."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, -1, keepdims=True)
    best, ids = largest(logits, n)
    chosen = jnp.take_along_axis(logits, token[:, None], 1) - total
    column = live[:, None]
    return LogProbs(
        jnp.where(column, chosen, 0)[:, 0], jnp.where(column, ids, 0), jnp.where(column, best - total, 0)
    )


def no_log_probs(rows: int, n: int) -> LogProbs:
    """Zeros in the shapes of `log_probs`."""
    zeros = lambda *shape: jnp.zeros((rows, *shape), jnp.float32)
    return LogProbs(zeros(), jnp.zeros((rows, n), jnp.int32), zeros(n))
