"""Generation: the whole token loop on the device, for ragged batches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from polarjax.cache import KVCache, init_cache
from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model import Decoder, decode_step, prefill
from polarjax.sampling import Greedy, Sampler
from polarjax.sparsity.select import Sparsity
from polarjax.types import Array, Bool, Float, Implementation, Int, Key

CHUNK = 8
"""Decoding steps between two looks at whether every sequence has stopped."""

SMALLEST_BUCKET = 16

type Step = Callable[[Int[Array, "B"], Any], tuple[Float[Array, "B V"], Any]]
"""A decoding step: (token [B], cache) -> (logits [B V], cache); the loop knows nothing else of the model."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of a batch.

    Attributes:
      tokens: int32 [B M], the stop id included; 0 beyond `lengths`.
      lengths: tokens generated in each row, int32 [B].
      stopped: whether a row ended with a stop id, bool [B]; the others ran out of `max_new_tokens`.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    stopped: Bool[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """What the token loop carries.

    Attributes:
      step: tokens drawn so far, int32 scalar.
      token: the latest token of each row, int32 [B].
      stopped: rows that have met a stop id, bool [B].
      tokens: output so far, int32 [B steps].
      lengths: tokens generated in each row, int32 [B].
      cache: whatever the step function carries.
    """

    step: Int[Array, ""]
    token: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    tokens: Int[Array, "B steps"]
    lengths: Int[Array, "B"]
    cache: Any


def decode_loop(
    step: Step,
    first_logits: Float[Array, "B V"],
    cache: Any,
    key: Key[Array, ""] | None,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> tuple[Generation, Any]:
    """Draws up to `max_new_tokens` tokens a row; returns them and the final cache. Traceable.

    Steps run in chunks of `CHUNK`; between chunks the loop ends early once every row has stopped.
    """
    batch_size = first_logits.shape[0]
    chunks = -(-(max_new_tokens - 1) // CHUNK)

    def draw(logits, state: LoopState) -> LoopState:
        drawn = sampler(logits, None if key is None else jax.random.fold_in(key, state.step))
        live = ~state.stopped & (state.step < max_new_tokens)
        token = jnp.where(live, drawn, 0)
        column = (jnp.zeros_like(state.step), state.step)
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], column)
        stopped = state.stopped | (live & _is_stop(token, stop_ids))
        lengths = state.lengths + live.astype(jnp.int32)
        return LoopState(state.step + 1, token, stopped, tokens, lengths, state.cache)

    def one(state: LoopState, _) -> tuple[LoopState, None]:
        logits, cache = step(state.token, state.cache)
        return draw(logits, dataclasses.replace(state, cache=cache)), None

    def chunk(state: LoopState) -> LoopState:
        return jax.lax.scan(one, state, None, length=CHUNK)[0]

    def unfinished(state: LoopState) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~jnp.all(state.stopped)

    zeros = jnp.zeros((batch_size,), jnp.int32)
    output = jnp.zeros((batch_size, 1 + chunks * CHUNK), jnp.int32)
    state = LoopState(jnp.int32(0), zeros, zeros.astype(bool), output, zeros, cache)
    state = jax.lax.while_loop(unfinished, chunk, draw(first_logits, state))
    return Generation(state.tokens[:, :max_new_tokens], state.lengths, state.stopped), state.cache


def _is_stop(token: Int[Array, "B"], stop_ids: tuple[int, ...]) -> Bool[Array, "B"]:
    if not stop_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.any(token[:, None] == jnp.asarray(stop_ids, jnp.int32)[None], -1)


@functools.partial(jax.jit, static_argnames=("capacity",))
def _read(model: Decoder, tokens, lengths, *, capacity: int) -> tuple[Float[Array, "B V"], KVCache]:
    cache = init_cache(model.config, batch_size=tokens.shape[0], capacity=capacity, dtype=model.dtype)
    return prefill(model, tokens, lengths, cache)


@functools.partial(
    jax.jit,
    static_argnames=("sampler", "max_new_tokens", "stop_ids", "implementation"),
    donate_argnames=("cache",),
)
def _write(model: Decoder, logits, cache: KVCache, key, sparsity, *, implementation, **settings):
    step = functools.partial(_step, model, sparsity=sparsity, implementation=implementation)
    return decode_loop(step, logits, cache, key, **settings)


def _step(model: Decoder, token, cache, *, sparsity, implementation):
    return decode_step(model, token, cache, sparsity=sparsity, implementation=implementation)


def generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: Key[Array, ""] | None = None,
    *,
    sampler: Sampler = Greedy(),
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    sparsity: Sparsity | None = None,
    implementation: Implementation = None,
) -> Generation:
    """Continues a right-padded batch of prompts: dense prefill, then (sparse) decoding, all on the device.

    Prompts are padded to a bucket (a power of two), and the compiled program is reused for any lengths inside it.

    Args:
      model: the decoder.
      tokens: prompts, int32 [B T]; what lies beyond `lengths` is ignored.
      lengths: valid tokens of each row, int32 [B], at least 1.
      key: random key; only a sampler that draws needs one.
      sampler: `Greedy()`, `Categorical(...)`, or any hashable `Sampler`.
      max_new_tokens: M.
      stop_ids: ids that end a row.
      sparsity: what to skip while decoding; None is the dense model.
      implementation: of the kernels; None takes the best for the device.

    Raises:
      InputError: empty or too long prompts, lengths outside [1, T], ids outside the vocabulary.
      SparsityError: routers or plan are for another model.
    """
    settings = {"sampler": sampler, "max_new_tokens": max_new_tokens, "stop_ids": tuple(map(int, stop_ids))}
    check_prompts(model.config, tokens, lengths, max_new_tokens)
    if sparsity is not None:
        sparsity.check(model.config)
    bucket = bucket_length(tokens.shape[1], model.config.max_positions)
    tokens = _widen(tokens, bucket)
    capacity = -(-(bucket + max_new_tokens) // 8) * 8
    logits, cache = _read(model, tokens, jnp.asarray(lengths, jnp.int32), capacity=capacity)
    return _write(model, logits, cache, key, sparsity, implementation=implementation, **settings)[0]


def bucket_length(length: int, limit: int) -> int:
    """The padded prompt length: the next power of two from 16 on, at most `limit` tokens."""
    return max(length, min(limit, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())))


def _widen(tokens: Int[Array, "B T"], width: int) -> Int[Array, "B width"]:
    """Padded on the host where the ids are known there, as each T would otherwise compile a program."""
    pad = jnp.pad if isinstance(tokens, Tracer) else np.pad
    return jnp.asarray(pad(tokens, ((0, 0), (0, width - tokens.shape[1]))), jnp.int32)


def check_prompts(config: ModelConfig, tokens, lengths, max_new_tokens: int) -> None:
    """Raises `InputError` on prompts that cannot be continued; values are checked only where they are concrete."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InputError(
            "nothing to generate",
            where="max_new_tokens",
            got=repr(max_new_tokens),
            expected="a positive whole number",
            mend="pass for example max_new_tokens=64",
        )
    if tokens.ndim != 2 or tokens.size == 0 or lengths.shape != tokens.shape[:1]:
        raise InputError(
            "prompts have the wrong shape",
            where="generate",
            got=f"tokens {tokens.shape}, lengths {lengths.shape}",
            expected="tokens [B T] and lengths [B], neither empty",
            mend="pad the prompts on the right to one width and pass their lengths",
        )
    if not all(jnp.issubdtype(each.dtype, jnp.integer) for each in (tokens, lengths)):
        raise InputError(
            "prompts are not whole numbers",
            where="generate",
            got=f"tokens {tokens.dtype}, lengths {lengths.dtype}",
            expected="int32",
            mend="pass token ids as a tokenizer gives them",
        )
    if isinstance(tokens, Tracer) or isinstance(lengths, Tracer):
        longest = tokens.shape[1]
    else:
        longest = _check_values(config, np.asarray(tokens), np.asarray(lengths))
    if longest + max_new_tokens > config.max_positions:
        raise InputError(
            "the sequence would outgrow the model's positions",
            where="generate",
            got=f"{longest} prompt tokens + {max_new_tokens} new ones",
            expected=f"at most {config.max_positions}",
            mend="shorten the prompt or lower max_new_tokens",
        )


def _check_values(config: ModelConfig, tokens: np.ndarray, lengths: np.ndarray) -> int:
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        row = int(np.argmax((lengths < 1) | (lengths > tokens.shape[1])))
        raise InputError(
            f"row {row} has an impossible length",
            where="lengths",
            got=int(lengths[row]),
            expected=f"1 to {tokens.shape[1]}, the width of tokens",
            mend="give every row at least one token",
        )
    valid = np.arange(tokens.shape[1])[None] < lengths[:, None]
    wrong = valid & ((tokens < 0) | (tokens >= config.vocab_size))
    if wrong.any():
        row, column = map(int, np.argwhere(wrong)[0])
        raise InputError(
            f"row {row}, token {column} is outside the vocabulary",
            where="tokens",
            got=int(tokens[row, column]),
            expected=f"0 to {config.vocab_size - 1}",
            mend="use the tokenizer that belongs to this model",
        )
    return int(lengths.max())
