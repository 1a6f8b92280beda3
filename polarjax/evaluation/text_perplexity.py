"""Perplexity of a dense or sparse model on windows of text."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.evaluation.checks import Mode, check_numbers
from polarjax.evaluation.scoring import score
from polarjax.model.decoder import Decoder
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      nll: mean negative log-likelihood, in nats per scored token.
      tokens: scored tokens.
      token_nll: negative log-likelihood of each token after the context, float32 [n, T - max(context, 1)]; NaN
        where a token is not scored. Entries of two runs over the same windows can be compared pairwise.
    """

    nll: float
    tokens: int
    token_nll: Float[np.ndarray, "n scored"] = dataclasses.field(repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """exp(nll): the size of a uniform choice as hard as the text; infinity if a float cannot hold it."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Bits per byte of the scored text, which has `num_bytes` bytes; comparable across tokenizers.

        NaN if no byte is scored, as in a text of special tokens only.
        """
        if num_bytes == 0:
            return math.nan
        return self.nll * self.tokens / math.log(2) / num_bytes

    def to_json(self) -> dict[str, float]:
        """All numbers except `token_nll`."""
        return {"nll": self.nll, "perplexity": self.perplexity, "tokens": self.tokens}


def perplexity(
    model: Decoder,
    windows: Int[np.ndarray, "n T"],
    *,
    sparsity: Sparsity | None = None,
    mode: Mode = "masked",
    batch_size: int = 8,
    context: int = 0,
    scored: Bool[np.ndarray, "n T"] | None = None,
    description: str = "perplexity",
) -> Perplexity:
    """Measures perplexity over non-overlapping windows; each window starts without history.

    The first token of a window (BOS, if the tokenizer has one) is not scored, nor are the first `context` tokens.
    If the last batch has fewer windows, it runs at that size.

    Mode "masked" is the published protocol: `forward` with the selection applied as a mask at every position,
    the first included, and neurons chosen for each token alone. Mode "decode" is what generation does:
    `decode_step` reads the true tokens of `batch_size` windows at a time, neurons are chosen once for that
    batch, and the dense `prefill` reads the first `context` tokens. At batch size 1 and context 0 the two
    are equal to rounding. Each plan, batch size and window length compiles once.

    Args:
      model: the decoder.
      windows: int32 [n T], all T tokens valid.
      sparsity: what to skip; None means dense.
      mode: "masked" or "decode".
      batch_size: B, windows that run together.
      context: tokens at the start of each window that are read but not scored.
      scored: bool [n T]; False excludes a token from the score, such as the BOS of a document inside a window (see
        `polarjax.text.token_windows.scored_windows`). None means all tokens after the context.
      description: text of the progress bar.

    Raises:
      InputError: windows, mode, context, mask or batch size that cannot be scored, or the model computes NaN.
      SparsityError: routers or plan are for another model, or an oracle or random selector in mode "decode".
    """
    losses, counted = score(
        model,
        windows,
        (sparsity,),
        token_nll,
        mode=mode,
        batch_size=batch_size,
        context=context,
        scored=scored,
        description=description,
    )
    check_numbers(losses, counted, where=description)
    nll = float(losses[counted].mean(dtype=np.float64))
    losses = np.where(counted, losses, np.float32(np.nan))
    return Perplexity(nll=nll, tokens=int(counted.sum()), token_nll=losses)


def token_nll(logits: tuple[Float[Array, "... V"], ...], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """Negative log-likelihood of each target under the first logits, in nats."""
    (scores,) = logits
    chosen = jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(scores, -1) - chosen
