"""Tokens while they are made: the token loop in jitted chunks, with a look from the host after each."""

import functools
from collections.abc import Iterator

import jax
import numpy as np

from polarjax.generation.batch import check_copies, check_new_tokens, check_stop_ids, prepare
from polarjax.generation.generate import model_step, read_prompts
from polarjax.generation.overlap import overlapping_jit
from polarjax.generation.sampling import Greedy, Sampler
from polarjax.generation.token_loop import Generation, LoopState, Rules
from polarjax.model.decoder import Decoder
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Bool, Implementation, Int, Key

CONTEXT = 8
"""Tokens of each prompt that are kept for the text: what a token reads as hangs on those before it."""


def stream(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: Key[Array, ""] | None = None,
    *,
    sampler: Sampler = Greedy(),
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    sparsity: Sparsity | None = None,
    implementation: Implementation = None,
) -> "TokenStream":
    """The tokens of `generate`, with the same arguments and errors, in pieces: first 1, then `CHUNK` at a time.

    One compiled program does a chunk of steps on the device, whatever the prompts of a bucket and `max_new_tokens`
    within the cache; the cache is donated to it and stays where it is.
    """
    max_new_tokens = check_new_tokens(max_new_tokens)
    copies = check_copies(num_return_sequences, sampler)
    prompts = prepare(model.config, tokens, lengths, max_new_tokens=max_new_tokens, copies=copies)
    seen = prompts.seen(model.config.vocab_size, repetition_penalty)
    if sparsity is not None:
        sparsity.check(model.config)
    logits, cache = read_prompts(model, prompts.tokens, prompts.lengths, capacity=prompts.capacity)
    settings = {
        "sampler": sampler,
        "stop_ids": check_stop_ids(stop_ids),
        "limit": np.int32(max_new_tokens),
        "repetition_penalty": float(repetition_penalty),
    }
    state = _begin(logits, cache, key, seen, **settings)
    advance = functools.partial(
        _advance, model, key=key, sparsity=sparsity, implementation=implementation, **settings
    )
    read = zip(np.asarray(prompts.tokens), np.asarray(prompts.lengths), strict=True)
    return TokenStream(
        state, advance, max_new_tokens, [row[max(0, n - CONTEXT) : n].tolist() for row, n in read]
    )


class TokenStream(Iterator[Generation]):
    """Pieces of a generation: each a `Generation` of NumPy arrays, holding only the tokens that are new.

    `tokens` [B c] are the new tokens, `lengths` how many of them each row has, `stopped` and `failed` the state of
    the rows so far. Each row's pieces put together are the row of `generate`. Dropping the stream frees its cache.

    Attributes:
      context: the last tokens of each row's prompt, at most `CONTEXT`.
      finished: whether no piece will follow.
    """

    def __init__(self, state: LoopState, advance, limit: int, context: list[list[int]]) -> None:
        self.context = context
        self.finished = False
        self._state: LoopState | None = state
        self._advance, self._limit = advance, limit
        self._halted = np.zeros(len(context), bool)
        self._before = np.zeros(len(context), np.int32)
        self._first = True

    def halt(self, rows: Bool[np.ndarray, "B"]) -> None:
        """Ends these rows; the others go on."""
        self._halted |= rows
        if self._halted.all():
            self.close()

    def close(self) -> None:
        """Ends all rows and frees the cache."""
        self.finished, self._state = True, None

    def __next__(self) -> Generation:
        """The next tokens of all rows; waits for the device."""
        state = self._state
        if state is None:
            raise StopIteration
        if self._first:
            self._first, new = False, state.token[:, None]
        else:
            state, new = self._advance(state, halted=self._halted)
            self._state = state
        step, tokens, lengths, stopped, failed = jax.device_get(
            (state.step, new, state.lengths, state.stopped, state.failed)
        )
        if step >= self._limit or (stopped | failed).all():
            self.close()
        added, self._before = lengths - self._before, lengths
        return Generation(tokens[:, : max(1, added.max())], added, stopped, failed)


_STATIC = ("sampler", "stop_ids", "repetition_penalty", "implementation")


@functools.partial(jax.jit, static_argnames=_STATIC[:3], donate_argnames=("cache", "seen"))
def _begin(logits, cache, key, seen, *, sampler, stop_ids, limit, repetition_penalty) -> LoopState:
    return Rules(sampler, stop_ids, limit, key, repetition_penalty).begin(logits, cache, seen)


@functools.partial(overlapping_jit, static_argnames=_STATIC, donate_argnames=("state",))
def _advance(model, state: LoopState, *, halted, key, sparsity, implementation, limit, **rules):
    step = functools.partial(model_step, model, sparsity=sparsity, implementation=implementation)
    loop = Rules(limit=limit, key=key, **rules)
    return loop.advance(step, loop.halted(state, halted))
