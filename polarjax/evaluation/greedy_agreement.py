"""How often the sparse model predicts the same token as the dense one, and how far their distributions differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.evaluation.checks import Mode, check_numbers
from polarjax.evaluation.scoring import score
from polarjax.model.decoder import Decoder
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The sparse model compared with the dense one, token by token on the same text.

    Attributes:
      top1: fraction of tokens where both models' most likely next token is the same.
      kl: mean Kullback-Leibler divergence of the sparse from the dense distribution, in nats per token.
      tokens: tokens compared.
    """

    top1: float
    kl: float
    tokens: int

    def to_json(self) -> dict[str, float]:
        """All fields."""
        return dataclasses.asdict(self)


def agreement(
    model: Decoder,
    windows: Int[np.ndarray, "n T"],
    sparsity: Sparsity,
    *,
    mode: Mode = "masked",
    batch_size: int = 8,
    context: int = 0,
    scored: Bool[np.ndarray, "n T"] | None = None,
    description: str = "agreement",
) -> Agreement:
    """Compares dense and sparse next-token distributions over windows of text; see `perplexity` for the arguments."""
    (same, divergence), counted = score(
        model,
        windows,
        (None, sparsity),
        compare,
        mode=mode,
        batch_size=batch_size,
        context=context,
        scored=scored,
        description=description,
    )
    check_numbers(divergence, counted, where=description)
    return Agreement(
        top1=float(same[counted].mean(dtype=np.float64)),
        kl=float(divergence[counted].mean(dtype=np.float64)),
        tokens=int(counted.sum()),
    )


def compare(
    logits: tuple[Float[Array, "... V"], ...], targets: Int[Array, "..."]
) -> tuple[Bool[Array, "..."], Float[Array, "..."]]:
    """Whether the most likely tokens are the same, and KL(dense ‖ sparse) in nats, at each token."""
    del targets
    dense, sparse = logits
    log_p, log_q = jax.nn.log_softmax(dense, -1), jax.nn.log_softmax(sparse, -1)
    terms = jnp.where(log_p == -jnp.inf, 0, jnp.exp(log_p) * (log_p - log_q))  # 0 log 0 = 0
    return jnp.argmax(dense, -1) == jnp.argmax(sparse, -1), jnp.sum(terms, -1)
