"""Generation: the whole token loop on the device, for ragged batches."""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.core import Tracer

from polarjax.generation.batch import make_rules, prepare
from polarjax.generation.checks import check_best, check_copies, check_new_tokens
from polarjax.generation.overlap import overlapping_jit
from polarjax.generation.sampling import Greedy, Sampler
from polarjax.generation.token_loop import Generation, Rules, StopIds, decode_loop, ids_in
from polarjax.model.cache import KVCache, init_cache
from polarjax.model.checks import check_implementation, check_model
from polarjax.model.chunks import read_in_chunks
from polarjax.model.decoder import Decoder, decode_step, prefill
from polarjax.model.meshes import auto_axes
from polarjax.model.readable import readable
from polarjax.model.spread_checks import check_around, check_batch, check_spread
from polarjax.selection.checks import check_sparsity
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Float, Implementation, Int, Key

READ_TOKENS = 8192
"""Prompt tokens that are read at a time, padding included, which bounds the memory that it takes."""


@functools.partial(jax.jit, static_argnames=("capacity",))
def read_prompts(model: Decoder, tokens, lengths, *, capacity: int) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits after prompts of one bucket, and a cache of `capacity` positions with the prompts in it."""

    def read(model: Decoder, tokens, lengths):
        cache = init_cache(model.config, batch_size=tokens.shape[0], capacity=capacity, dtype=model.dtype)
        if tokens.size <= READ_TOKENS:
            return prefill(model, tokens, lengths, cache)
        return read_in_chunks(model, tokens, lengths, cache, most=READ_TOKENS)

    out = lambda places: (places.logits, places.cache)
    return auto_axes(read, tokens, model, tokens, lengths, layout=model.layout, out=out)


@functools.partial(
    overlapping_jit,
    rows=lambda model, logits, *others, **options: logits,
    static_argnames=("room", "implementation"),
    donate_argnames=("cache",),
)
def write(model: Decoder, logits, cache: KVCache, prompts, rules: Rules, sparsity, *, room, implementation):
    """Continues prompts that were read: the `Generation` and the final cache, which reuses the buffers of `cache`."""

    def loop(model, logits, cache, prompts, rules, sparsity):
        step = functools.partial(model_step, model, sparsity=sparsity, implementation=implementation)
        seen = ids_in(prompts[0], prompts[1], logits.shape[1])
        return decode_loop(step, logits, cache, rules, seen, room=room)

    out = lambda places: (places.rows, places.cache)
    given = (model, logits, cache, prompts, rules, sparsity)
    return auto_axes(loop, logits, *given, layout=model.layout, out=out)


def model_step(model: Decoder, token, cache, live, *, sparsity, implementation):
    """A decoding step with the token loop's argument order."""
    return decode_step(model, token, cache, sparsity=sparsity, live=live, implementation=implementation)


class Started(NamedTuple):
    """What a whole generation and a stream both begin with: checked arguments, and prompts that were read.

    Attributes:
      limit: M, new tokens of each row.
      room: the bucket of `limit`.
      rules: how tokens are drawn and rows end.
      batch: padded tokens [B bucket] and lengths [B] of the prompts.
      logits: float32 [B V], after the prompts.
      cache: with the prompts in it.
    """

    limit: int
    room: int
    rules: Rules
    batch: tuple[Int[Array, "B bucket"], Int[Array, "B"]]
    logits: Float[Array, "B V"]
    cache: KVCache


def start(
    model: Decoder,
    tokens,
    lengths,
    key,
    *,
    where: str,
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: StopIds,
    repetition_penalty: Float[Array, ""] | float,
    num_return_sequences: int,
    logprobs: int | None,
    sparsity: Sparsity | None,
    implementation: Implementation,
) -> Started:
    """Checks the arguments of `generate` and reads the prompts; `where` is the function that errors name."""
    check_model(model, where=where)
    check_around(model)
    check_sparsity(sparsity, model.config)
    check_spread(model, sparsity)
    check_implementation(implementation)
    limit = check_new_tokens(max_new_tokens)
    copies = check_copies(num_return_sequences, sampler)
    rules = make_rules(
        key,
        sampler=sampler,
        max_new_tokens=limit,
        stop_ids=stop_ids,
        repetition_penalty=repetition_penalty,
        best=check_best(logprobs, model.config.vocab_size),
    )
    prompts = prepare(model, tokens, lengths, where=where, max_new_tokens=limit, copies=copies)
    check_batch(model, sparsity, prompts.tokens.shape[0], where=where)
    batch = (prompts.tokens, prompts.lengths)
    logits, cache = read_prompts(model, *batch, capacity=prompts.capacity)
    return Started(limit, prompts.room, rules, batch, logits, cache)


def generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: Key[Array, ""] | None = None,
    *,
    sampler: Sampler = Greedy(),
    max_new_tokens: int,
    stop_ids: StopIds = (),
    repetition_penalty: Float[Array, ""] | float = 1.0,
    num_return_sequences: int = 1,
    logprobs: int | None = None,
    sparsity: Sparsity | None = None,
    implementation: Implementation = None,
) -> Generation:
    """Continues a right-padded batch of prompts: dense prefill, then (sparse) decoding, all on the device.

    Prompts are padded to a bucket (a power of two), and so is the room for new tokens; the compiled program is reused
    for any lengths, `max_new_tokens`, stop ids, penalty and `Categorical` values that fit. If the room is wider than M,
    the call waits for the result.

    Args:
      model: the decoder.
      tokens: prompts, int32 [B T]; ids beyond `lengths` are ignored.
      lengths: valid tokens of each row, int32 [B], at least 1.
      key: random key; only a sampler that draws needs one.
      sampler: `Greedy()`, `Categorical(...)`, or any hashable `Sampler`, which is static.
      max_new_tokens: M; prompt and new tokens but the last, which is never read, fit into the model's positions.
      stop_ids: ids that end a row, 0 to 2**31 - 1; one id, several, or None.
      repetition_penalty: above 1, makes ids already in a row, including its prompt, less likely.
      num_return_sequences: n; every prompt is continued n times, in consecutive rows: B becomes n·B.
      logprobs: n; the result has the log-probabilities of its tokens and of the n likeliest at each position, from the
        logits before penalty and temperature. None computes none. Static.
      sparsity: what to skip while decoding; None is the dense model.
      implementation: "mosaic" (our kernels, for Hopper GPUs) or "xla"; None takes the best for the device.

    Raises:
      InputError: empty or too long prompts, lengths outside [1, T], ids outside the vocabulary, stop ids that can't
        be ids, several greedy sequences of one prompt, a sampler that doesn't draw one id for each row.
      SparsityError: routers or plan are for another model.
    """
    started = start(
        model,
        tokens,
        lengths,
        key,
        where="generate",
        sampler=sampler,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        repetition_penalty=repetition_penalty,
        num_return_sequences=num_return_sequences,
        logprobs=logprobs,
        sparsity=sparsity,
        implementation=implementation,
    )
    options = {"room": started.room, "implementation": implementation}
    made, _ = write(model, started.logits, started.cache, started.batch, started.rules, sparsity, **options)
    made = readable(made)
    return made if started.limit == started.room else _shortened(made, started.limit)


def _shortened(made: Generation, width: int) -> Generation:
    """The first `width` tokens; cut on the host if possible, since each width would otherwise compile a program."""

    def cut(leaf):
        if isinstance(leaf, Tracer) or not leaf.is_fully_addressable:
            return leaf[:, :width]
        return jax.device_put(jax.device_get(leaf)[:, :width], leaf.sharding if leaf.committed else None)

    return dataclasses.replace(made, tokens=cut(made.tokens), logprobs=jax.tree.map(cut, made.logprobs))
