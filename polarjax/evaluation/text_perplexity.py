"""Perplexity of a dense or sparse model on windows of text."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.evaluation.checks import check_numbers
from polarjax.evaluation.scoring import Mode, score
from polarjax.model.decoder import Decoder
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      nll: mean negative log-likelihood, in nats per scored token.
      tokens: scored tokens.
      token_nll: negative log-likelihood of each scored token, float32 [n, T - max(context, 1)]; differences
        between two runs over the same windows are paired.
    """

    nll: float
    tokens: int
    token_nll: Float[np.ndarray, "n scored"] = dataclasses.field(repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """exp(nll): the size of a uniform choice as hard as the text; infinity where a float cannot hold it."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits needed for each byte of the scored text, which is `num_bytes` long: free of the tokenizer.

        NaN where no byte is scored, as in a text of special tokens alone.
        """
        if num_bytes == 0:
            return math.nan
        return self.nll * self.tokens / math.log(2) / num_bytes

    def to_json(self) -> dict[str, float]:
        """The numbers without the token by token record."""
        return {"nll": self.nll, "perplexity": self.perplexity, "tokens": self.tokens}


def perplexity(
    model: Decoder,
    windows: Int[np.ndarray, "n T"],
    *,
    sparsity: Sparsity | None = None,
    mode: Mode = "masked",
    batch_size: int = 8,
    context: int = 0,
    description: str = "perplexity",
) -> Perplexity:
    """Perplexity over non-overlapping windows; nothing is carried from one window to the next.

    The first token of a window (BOS, where the tokenizer has one: `polarjax.data.windows(..., first=bos)`) is
    not scored, nor is any of the first `context` tokens. A last batch of fewer windows runs at its own size.

    Mode "masked" is the published protocol: `forward` with the selection applied as a mask at every position,
    the first included, and neurons chosen for each token alone. Mode "decode" is what generation does:
    `decode_step` is fed the true tokens of `batch_size` windows at a time, neurons are chosen once for that
    batch, and the first `context` tokens are read by the dense `prefill`. At batch size 1 and context 0 the two
    are equal to rounding. Each plan, batch size and window length compiles anew.

    Args:
      model: the decoder.
      windows: int32 [n T], all T tokens valid.
      sparsity: what to skip; None is the dense model.
      mode: "masked" or "decode".
      batch_size: B, windows that run together.
      context: tokens at the start of each window that are given, not scored.
      description: for the progress bar.

    Raises:
      InputError: windows, mode, context or batch size that cannot be scored.
      SparsityError: routers or plan for another model, or an oracle or random selector in mode "decode".
    """
    losses = score(
        model,
        windows,
        (sparsity,),
        token_nll,
        mode=mode,
        batch_size=batch_size,
        context=context,
        description=description,
    )
    check_numbers(losses, where=description)
    return Perplexity(nll=float(losses.mean(dtype=np.float64)), tokens=losses.size, token_nll=losses)


def token_nll(logits: tuple[Float[Array, "... V"], ...], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """Negative log-likelihood of each target under the first logits, in nats."""
    (scores,) = logits
    chosen = jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(scores, -1) - chosen
