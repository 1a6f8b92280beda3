"""Streams tokens: the token loop in jitted chunks, read by the host after each."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from polarjax.generation.checks import check_not_traced, checked_rows
from polarjax.generation.generate import model_step, start
from polarjax.generation.overlap import overlapping_jit
from polarjax.generation.sampling import Greedy, Sampler
from polarjax.generation.token_loop import Generation, LoopState, Rules, StopIds, ids_in
from polarjax.model.decoder import Decoder
from polarjax.model.flat import Flat, of_flat
from polarjax.model.layout import Layout
from polarjax.model.meshes import Places, auto_axes
from polarjax.model.readable import fetched
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Bool, Implementation, Int, Key

CONTEXT = 8
"""Tokens kept of each prompt: a token's text depends on the tokens before it."""


def stream(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: Key[Array, ""] | None = None,
    *,
    sampler: Sampler = Greedy(),
    max_new_tokens: int,
    stop_ids: StopIds = (),
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    logprobs: int | None = None,
    sparsity: Sparsity | None = None,
    implementation: Implementation = None,
) -> "TokenStream":
    """The tokens of `generate`, with the same arguments and errors, in pieces: first 1, then `CHUNK` at a time.

    One compiled program runs a chunk of steps on the device, for all prompts of a bucket, `max_new_tokens` within the
    cache, and other settings; the cache is donated to it. Doesn't work inside `jax.jit`: tokens go to the host as they
    are generated.
    """
    given = (model, tokens, lengths, key, sampler, stop_ids, repetition_penalty, sparsity)
    check_not_traced(given, where="stream")
    started = start(
        model,
        tokens,
        lengths,
        key,
        where="stream",
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        repetition_penalty=repetition_penalty,
        num_return_sequences=num_return_sequences,
        logprobs=logprobs,
        sparsity=sparsity,
        implementation=implementation,
    )
    state = _begin(started.logits, started.cache, started.batch, started.rules, layout=model.layout)
    options = {"sparsity": sparsity, "implementation": implementation}
    advance = functools.partial(_advance, Flat(model), rules=started.rules, **options)
    read = zip(*fetched(started.batch), strict=True)
    context = [row[max(0, n - CONTEXT) : n].tolist() for row, n in read]
    return TokenStream(state, advance, started.limit, context)


class TokenStream(Iterator[Generation]):
    """Yields pieces of a generation: `Generation`s of NumPy arrays with only the new tokens.

    `tokens` [B c] are the new tokens, `lengths` how many of them each row has, `logprobs` theirs, `stopped` and
    `failed` the state of the rows so far. A row's pieces concatenate to its row of `generate`. Dropping the stream frees
    its cache.

    Attributes:
      context: the last tokens of each row's prompt, at most `CONTEXT`.
      finished: whether the last piece was yielded.
    """

    def __init__(self, state: LoopState, advance, limit: int, context: list[list[int]]) -> None:
        self.context = context
        self.finished = False
        self._state: LoopState | None = state
        self._advance, self._limit = advance, limit
        self._halted = np.zeros(len(context), bool)
        self._before: Any = np.zeros(len(context), np.int32)
        self._first = True

    def halt(self, rows: Bool[np.ndarray, "B"]) -> None:
        """Ends these rows; the others continue. Raises `InputError` unless there is a boolean for each row."""
        self._halted |= checked_rows(rows, len(self._halted))
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
            self._first, new = False, jax.tree.map(lambda leaf: leaf[:, None], (state.token, state.logprobs))
        else:
            state, new = self._advance(state, halted=jax.device_put(self._halted))
            self._state = state
        step, new, lengths, stopped, failed = fetched(
            (state.step, new, state.lengths, state.stopped, state.failed)
        )
        if step >= self._limit or (stopped | failed).all():
            self.close()
        added, self._before = lengths - self._before, lengths
        tokens, logprobs = jax.tree.map(lambda leaf: leaf[:, : max(1, added.max())], new)
        return Generation(tokens, added, stopped, failed, logprobs)


def state_places(places: Places) -> LoopState:
    """Where a state lies on a mesh."""
    rows = dict.fromkeys((field.name for field in dataclasses.fields(LoopState)), places.rows)
    return LoopState(**rows | {"step": places.scalar, "seen": places.logits, "cache": places.cache})  # pyrefly: ignore[bad-argument-type]


@functools.partial(jax.jit, donate_argnames=("cache",), static_argnames=("layout",))
def _begin(logits, cache, prompts, rules: Rules, *, layout: Layout | None) -> LoopState:
    def begin(logits, cache, prompts, rules):
        return rules.begin(logits, cache, ids_in(prompts[0], prompts[1], logits.shape[1]))

    return auto_axes(begin, logits, logits, cache, prompts, rules, layout=layout, out=state_places)


@functools.partial(
    overlapping_jit,
    rows=lambda model, state, **others: state.token,
    static_argnames=("implementation",),
    donate_argnames=("state",),
)
@of_flat
def _advance(model, state: LoopState, *, halted, rules: Rules, sparsity, implementation):
    def advance(model, state, halted, rules, sparsity):
        step = functools.partial(model_step, model, sparsity=sparsity, implementation=implementation)
        return rules.advance(step, rules.halted(state, halted))

    out = lambda places: (state_places(places), places.rows)
    given = (model, state, halted, rules, sparsity)
    return auto_axes(advance, state.token, *given, layout=model.layout, out=out)
