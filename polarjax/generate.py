"""Generation: the whole token loop on the device, for ragged batches."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from polarjax.cache import KVCache, init_cache
from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model import Decoder, decode_step, prefill
from polarjax.numeric import plain
from polarjax.overlap import overlapping_jit
from polarjax.sampling import Greedy, Sampler
from polarjax.sparsity.select import Sparsity
from polarjax.token_loop import LARGEST_ID, Generation, decode_loop, is_token_id
from polarjax.types import Array, Bool, Float, Implementation, Int, Key

SMALLEST_BUCKET = 16


@functools.partial(jax.jit, static_argnames=("capacity",))
def read_prompts(model: Decoder, tokens, lengths, *, capacity: int) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits after prompts of one bucket, and a cache of `capacity` positions with the prompts in it."""
    cache = init_cache(model.config, batch_size=tokens.shape[0], capacity=capacity, dtype=model.dtype)
    return prefill(model, tokens, lengths, cache)


@functools.partial(jax.jit, static_argnames=("vocab_size",))
def _ids_in(tokens, lengths, *, vocab_size: int) -> Bool[Array, "B V"]:
    rows, width = tokens.shape
    valid = jnp.arange(width)[None] < lengths[:, None]
    ids = jnp.where(valid, tokens, vocab_size)  # outside: dropped
    none = jnp.zeros((rows, vocab_size), bool)
    return none.at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")


@functools.partial(
    overlapping_jit,
    static_argnames=("sampler", "max_new_tokens", "stop_ids", "repetition_penalty", "implementation"),
    donate_argnames=("cache",),
)
def _write(model: Decoder, logits, cache: KVCache, key, sparsity, *, implementation, **settings):
    step = functools.partial(model_step, model, sparsity=sparsity, implementation=implementation)
    return decode_loop(step, logits, cache, key, **settings)


def model_step(model: Decoder, token, cache, live, *, sparsity, implementation):
    """A decoding step in the order of arguments that the token loop wants."""
    return decode_step(model, token, cache, sparsity=sparsity, live=live, implementation=implementation)


def generate(
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
) -> Generation:
    """Continues a right-padded batch of prompts: dense prefill, then (sparse) decoding, all on the device.

    Prompts are padded to a bucket (a power of two), and the compiled program is reused for any lengths inside it.

    Args:
      model: the decoder.
      tokens: prompts, int32 [B T]; what lies beyond `lengths` is ignored.
      lengths: valid tokens of each row, int32 [B], at least 1.
      key: random key; only a sampler that draws needs one.
      sampler: `Greedy()`, `Categorical(...)`, or any hashable `Sampler`.
      max_new_tokens: M; prompt and new tokens but the last, which is never read, fit into the model's positions.
      stop_ids: ids that end a row, 0 to 2**31 - 1.
      repetition_penalty: above 1, makes ids less likely that a row holds already, its prompt included.
      num_return_sequences: n; every prompt is continued n times, in rows that follow one another: B becomes n·B.
      sparsity: what to skip while decoding; None is the dense model.
      implementation: of the kernels; None takes the best for the device.

    Raises:
      InputError: empty or too long prompts, lengths outside [1, T], ids outside the vocabulary, stop ids that are
        none, several greedy sequences of one prompt.
      SparsityError: routers or plan are for another model.
    """
    max_new_tokens = check_new_tokens(max_new_tokens)
    settings = {"sampler": sampler, "max_new_tokens": max_new_tokens, "stop_ids": check_stop_ids(stop_ids)}
    prompts = prepare(
        model.config,
        tokens,
        lengths,
        max_new_tokens=max_new_tokens,
        copies=check_copies(num_return_sequences, sampler),
    )
    seen = prompts.seen(model.config.vocab_size, repetition_penalty)
    if sparsity is not None:
        sparsity.check(model.config)
    logits, cache = read_prompts(model, prompts.tokens, prompts.lengths, capacity=prompts.capacity)
    settings |= {"repetition_penalty": float(repetition_penalty), "seen": seen}
    return _write(model, logits, cache, key, sparsity, implementation=implementation, **settings)[0]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch as the compiled programs take it.

    Attributes:
      tokens: int32 [B bucket].
      lengths: int32 [B].
      capacity: positions that the cache needs.
    """

    tokens: Int[Array, "B bucket"]
    lengths: Int[Array, "B"]
    capacity: int

    def seen(self, vocab_size: int, repetition_penalty: float) -> Bool[Array, "B V"] | None:
        """Ids in each prompt, for a penalty; None for a penalty of 1. Raises `InputError` if it is none at all."""
        if not (0 < repetition_penalty < math.inf):
            raise InputError(
                "unusable penalty",
                where="repetition_penalty",
                got=repr(repetition_penalty),
                expected="above 0",
                mend="1 is no penalty, 1.1 a mild one",
            )
        return None if repetition_penalty == 1 else _ids_in(self.tokens, self.lengths, vocab_size=vocab_size)


def prepare(config: ModelConfig, tokens, lengths, *, max_new_tokens: int, copies: int = 1) -> Prompts:
    """Checks prompts, repeats each `copies` times and pads them to their bucket; see `generate`."""
    check_prompts(config, tokens, lengths, max_new_tokens)
    bucket = bucket_length(tokens.shape[1], config.max_positions)
    tokens, lengths = _widen(tokens, lengths, bucket, copies)
    return Prompts(tokens, lengths, -(-(bucket + max_new_tokens) // 8) * 8)


def check_new_tokens(count: int) -> int:
    """`count` if so many tokens can be asked for; raises `InputError` otherwise."""
    count = plain(count)
    if type(count) is not int or count < 1:
        raise InputError(
            "nothing to generate",
            where="max_new_tokens",
            got=repr(count),
            expected="a positive whole number",
            mend="pass for example max_new_tokens=64",
        )
    return count


def check_stop_ids(ids: Iterable[int]) -> tuple[int, ...]:
    """`ids` if they can be token ids; raises `InputError` otherwise."""
    ids = tuple(map(plain, ids))
    for each in ids:
        if not is_token_id(each):
            raise InputError(
                "not a token id",
                where="stop_ids",
                got=repr(each),
                expected=f"whole numbers, 0 to {LARGEST_ID}",
                mend="pass ids of the model's tokenizer",
            )
    return ids


def check_copies(count: int, sampler: Sampler) -> int:
    """`count` if so many sequences of a prompt can be had; raises `InputError` otherwise."""
    count = plain(count)
    if type(count) is not int or count < 1:
        mend = "pass 1 or more"
        raise InputError("no sequences", where="num_return_sequences", got=repr(count), mend=mend)
    if count > 1 and isinstance(sampler, Greedy):
        raise InputError(
            "greedy sequences of one prompt are all the same",
            where="num_return_sequences",
            got=count,
            expected="1",
            mend="draw them: Categorical(), or --temperature 1",
        )
    return count


def bucket_length(length: int, limit: int) -> int:
    """The padded prompt length: the next power of two from 16 on, at most `limit` tokens."""
    return max(length, min(limit, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())))


def _widen(tokens, lengths, width: int, copies: int) -> tuple[Int[Array, "B width"], Int[Array, "B"]]:
    """Padded on the host where the ids are known there, as each T would otherwise compile a program."""
    xp = jnp if isinstance(tokens, Tracer) or isinstance(lengths, Tracer) else np
    tokens = xp.pad(xp.asarray(tokens), ((0, 0), (0, width - tokens.shape[1])))
    if copies > 1:
        tokens, lengths = xp.repeat(tokens, copies, 0), xp.repeat(xp.asarray(lengths), copies, 0)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)


def check_prompts(config: ModelConfig, tokens, lengths, max_new_tokens: int) -> None:
    """Raises `InputError` on prompts that cannot be continued; values are checked only where they are concrete."""
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
    if longest + max_new_tokens - 1 > config.max_positions:  # the last new token is never read
        raise InputError(
            "the sequence would outgrow the model's positions",
            where="generate",
            got=f"{longest} prompt tokens + {max_new_tokens} new ones",
            expected=f"at most {config.max_positions} before the last one",
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
