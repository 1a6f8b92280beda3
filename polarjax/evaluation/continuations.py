"""Log-likelihoods of continuations of many lengths, with one compiled program for each padded length."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.evaluation.checks import Mode, check_mode
from polarjax.evaluation.continuation_checks import check_continuations, check_scores
from polarjax.generation.batch import bucket_length
from polarjax.memory import explained_out_of_memory
from polarjax.model.checks import check_model
from polarjax.model.decoder import Decoder, forward
from polarjax.model.layout import mesh_of
from polarjax.model.meshes import on_any_mesh
from polarjax.model.readable import fetched
from polarjax.model.spread_checks import check_around
from polarjax.progress import task
from polarjax.selection.checks import check_sparsity
from polarjax.selection.masking import AfterPrompts
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Bool, Float, Int

LAST_TOKENS = 8  # scored from one row: continuations that differ in their last token only share a row
MOST_ROWS = 64
LOGITS_BYTES = 10**9  # for the logits of a batch whose size is not given

type Pair = tuple[Sequence[int], Sequence[int]]
"""The token ids of a context and of its continuation, neither empty."""


class Score(NamedTuple):
    """How likely a continuation is: the sum of its tokens' log-probabilities, and whether greedy decoding writes it."""

    log_likelihood: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    """One input of the model and the requests that it answers: (index, last token, tokens of the continuation); the
    first `prompt` tokens are computed densely."""

    tokens: tuple[int, ...]
    prompt: int
    requests: Sequence[tuple[int, int, int]]


def score_continuations(
    model: Decoder,
    pairs: Sequence[Pair],
    *,
    sparsity: Sparsity | None = None,
    mode: Mode = "masked",
    batch_size: int | None = None,
    max_length: int | None = None,
    description: str = "scoring",
) -> Iterator[tuple[int, Score]]:
    """Scores each continuation given its context; yields (index, score) as batches finish, the longest first.

    The model reads all tokens but the last. What is longer than `max_length` loses its oldest tokens. Rows are padded to
    powers of two, so there is one compilation for each power up to the longest. Equal inputs are computed once.
    Nothing is skipped but masked, for each token alone.

    Args:
      model: the decoder.
      pairs: token ids of contexts and continuations, neither empty.
      sparsity: what to skip; None means dense.
      mode: "masked" is sparse at every position; "decode" only after the context, as generation is: so what predicts
        the continuation's first token is dense.
      batch_size: B, rows that run together; None takes as many as `LOGITS_BYTES` allow, at most `MOST_ROWS`.
      max_length: most tokens that the model reads at once; None is its number of positions.
      description: text of the progress bar.

    Raises:
      InputError: a context or continuation has no tokens or unknown ones, a continuation is longer than `max_length`,
        the model computes NaN, or the device's memory runs out.
      SparsityError: routers or plan are for another model.
    """
    check_model(model, where="evaluation")
    check_around(model)
    check_sparsity(sparsity, model.config)
    check_mode(mode)
    longest = check_continuations(pairs, model.config, batch_size, max_length)
    rows = _rows(pairs, longest, apart=mode == "decode" and sparsity is not None)
    return _scored(model, rows, sparsity, batch_size, description)


def _rows(pairs: Sequence[Pair], longest: int, *, apart: bool) -> list[_Row]:
    """Requests with the same input share a row; the longest rows first. `apart`: contexts are computed densely."""
    shared = collections.defaultdict(list)
    for i, (context, continuation) in enumerate(pairs):
        tokens = (*context, *continuation)[-(longest + 1) :]
        prompt = len(tokens) - len(continuation) if apart else 0
        shared[tokens[:-1], prompt].append((i, tokens[-1], len(continuation)))
    rows = [
        _Row(tokens, prompt, requests[start : start + LAST_TOKENS])
        for (tokens, prompt), requests in shared.items()
        for start in range(0, len(requests), LAST_TOKENS)
    ]
    return sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))


def _scored(
    model: Decoder, rows: list[_Row], sparsity: Sparsity | None, batch_size: int | None, description: str
) -> Iterator[tuple[int, Score]]:
    total = sum(len(row.requests) for row in rows)
    with task(description, total, "requests") as advance:
        start = 0
        while start < len(rows):
            width = bucket_length(len(rows[start].tokens), model.config.max_positions)
            size = batch_size or rows_of(width, model.config.vocab_size)
            batch = rows[start : start + size]
            start += size
            sizes = {"batch_size": size, "cache_length": width, "dtype": model.dtype, "mesh": mesh_of(model)}
            with explained_out_of_memory(model.config, **sizes):
                scores = _run(model, batch, sparsity, size, width)
            yield from scores
            advance(len(scores))


def rows_of(width: int, vocab_size: int) -> int:
    """Rows of `width` tokens whose float32 logits fit in `LOGITS_BYTES`: a power of two from 1 to `MOST_ROWS`."""
    fitting = max(1, LOGITS_BYTES // (4 * vocab_size * width))
    return min(MOST_ROWS, 1 << (fitting.bit_length() - 1))


def _run(
    model: Decoder, batch: Sequence[_Row], sparsity: Sparsity | None, size: int, width: int
) -> list[tuple[int, Score]]:
    """The scores of a batch's requests; missing rows are filled with one token."""
    tokens, last = np.zeros((size, width), np.int32), np.zeros((size, LAST_TOKENS), np.int32)
    lengths, prompts = np.ones(size, np.int32), np.zeros(size, np.int32)
    for i, row in enumerate(batch):
        lengths[i], prompts[i] = len(row.tokens), row.prompt
        tokens[i, : lengths[i]] = row.tokens
        last[i, : len(row.requests)] = [token for _, token, _ in row.requests]
    tokens, lengths, last, prompts = jax.device_put((tokens, lengths, last, prompts))
    skip = (
        AfterPrompts.of(sparsity, prompts)
        if sparsity is not None and any(row.prompt for row in batch)
        else sparsity
    )
    found = fetched(_log_probabilities(model, tokens, lengths, last, skip))
    inner, inner_best, final, final_best = found
    scores = []
    for i, row in enumerate(batch):
        for k, (index, _, count) in enumerate(row.requests):
            before = slice(
                lengths[i] - count, lengths[i] - 1
            )  # positions that predict all tokens but the last
            value = inner[i, before].sum(dtype=np.float64) + float(final[i, k])
            scores.append(
                (index, Score(float(value), bool(inner_best[i, before].all() and final_best[i, k])))
            )
    check_scores([score.log_likelihood for _, score in scores])
    return scores


@jax.jit
@on_any_mesh("tokens", lambda places: places.rows)
def _log_probabilities(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    last: Int[Array, "B k"],
    sparsity: Sparsity | None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Float[Array, "B k"], Bool[Array, "B k"]]:
    """Log-probabilities of each next token and of k last tokens after the row; for each, whether it is the likeliest."""
    logits, _ = forward(model, tokens, lengths, sparsity=sparsity)
    after = jnp.roll(tokens, -1, 1)
    best, total = jnp.argmax(logits, -1).astype(tokens.dtype), jax.nn.logsumexp(logits, -1)
    inner = jnp.take_along_axis(logits, after[..., None], 2)[..., 0] - total
    at_end = lambda values: jnp.take_along_axis(values, (lengths - 1)[:, None], 1)
    end = jnp.take_along_axis(logits, (lengths - 1)[:, None, None], 1)[:, 0]
    final = jnp.take_along_axis(end, last, 1) - at_end(total)
    return inner, best == after, final, at_end(best) == last
