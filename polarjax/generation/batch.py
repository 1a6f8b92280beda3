"""A batch of prompts as the compiled programs take it, and the checks of what a caller asks for."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.generation.sampling import Greedy, Sampler
from polarjax.generation.token_loop import LARGEST_ID, is_token_id
from polarjax.model.checks import check_room, check_vocabulary
from polarjax.numeric import plain
from polarjax.types import Array, Bool, Int, Key

SMALLEST_BUCKET = 16


@functools.partial(jax.jit, static_argnames=("vocab_size",))
def _ids_in(tokens, lengths, *, vocab_size: int) -> Bool[Array, "B V"]:
    rows, width = tokens.shape
    valid = jnp.arange(width)[None] < lengths[:, None]
    ids = jnp.where(valid, tokens, vocab_size)  # outside: dropped
    none = jnp.zeros((rows, vocab_size), bool)
    return none.at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")


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
                hint="1 is no penalty, 1.1 a mild one",
            )
        return None if repetition_penalty == 1 else _ids_in(self.tokens, self.lengths, vocab_size=vocab_size)


def prepare(config: ModelConfig, tokens, lengths, *, max_new_tokens: int, copies: int = 1) -> Prompts:
    """Checks prompts, repeats each `copies` times and pads them to their bucket; see `generate`."""
    check_prompts(config, tokens, lengths, max_new_tokens)
    bucket = bucket_length(tokens.shape[1], config.max_positions)
    tokens, lengths = _widen(tokens, lengths, bucket, copies)
    return Prompts(tokens, lengths, -(-positions(config, tokens.shape[1], max_new_tokens) // 8) * 8)


def positions(config: ModelConfig, length: int, max_new_tokens: int) -> int:
    """Positions that prompts padded to `length` tokens and what follows them take up in the cache."""
    return bucket_length(length, config.max_positions) + max_new_tokens


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


def check_new_tokens(count: int) -> int:
    """`count` if so many tokens can be asked for; raises `InputError` otherwise."""
    count = plain(count)
    if type(count) is not int or count < 1:
        raise InputError(
            "nothing to generate",
            where="max_new_tokens",
            got=repr(count),
            expected="a positive whole number",
            hint="pass for example max_new_tokens=64",
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
                hint="pass ids of the model's tokenizer",
            )
    return ids


SEEDS = range(-(2**63), 2**63)  # what JAX takes


def random_key(key: Key[Array, ""] | int, where: str = "key") -> Key[Array, ""]:
    """`key` itself, or the random key of a seed; raises `InputError` if there is none for it."""
    if isinstance(key, jax.Array) and (key.ndim or jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        return key
    seed = plain(key)
    if type(seed) is not int or seed not in SEEDS:
        expected = f"{SEEDS[0]} to {SEEDS[-1]}"
        raise InputError(
            "no such seed", where=where, got=repr(seed), expected=expected, hint="give 0, 1, 2, …"
        )
    return jax.random.key(seed)


def check_copies(count: int, sampler: Sampler) -> int:
    """`count` if so many sequences of a prompt can be had; raises `InputError` otherwise."""
    count = plain(count)
    if type(count) is not int or count < 1:
        hint = "pass 1 or more"
        raise InputError("no sequences", where="num_return_sequences", got=repr(count), hint=hint)
    if count > 1 and isinstance(sampler, Greedy):
        raise InputError(
            "greedy sequences of one prompt are all the same",
            where="num_return_sequences",
            got=count,
            expected="1",
            hint="draw them: Categorical(), or --temperature 1",
        )
    return count


def check_prompts(config: ModelConfig, tokens, lengths, max_new_tokens: int) -> None:
    """Raises `InputError` on prompts that cannot be continued; values are checked only where they are concrete."""
    if tokens.ndim != 2 or tokens.size == 0 or lengths.shape != tokens.shape[:1]:
        raise InputError(
            "prompts have the wrong shape",
            where="generate",
            got=f"tokens {tokens.shape}, lengths {lengths.shape}",
            expected="tokens [B T] and lengths [B], neither empty",
            hint="pad the prompts on the right to one width and pass their lengths",
        )
    if not all(jnp.issubdtype(each.dtype, jnp.integer) for each in (tokens, lengths)):
        raise InputError(
            "prompts are not whole numbers",
            where="generate",
            got=f"tokens {tokens.dtype}, lengths {lengths.dtype}",
            expected="int32",
            hint="pass token ids as a tokenizer gives them",
        )
    if isinstance(tokens, Tracer) or isinstance(lengths, Tracer):
        longest = tokens.shape[1]
    else:
        longest = _check_values(config, np.asarray(tokens), np.asarray(lengths))
    check_room(config, longest, max_new_tokens, where="generate")


def _check_values(config: ModelConfig, tokens: np.ndarray, lengths: np.ndarray) -> int:
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        row = int(np.argmax((lengths < 1) | (lengths > tokens.shape[1])))
        raise InputError(
            f"row {row} has an impossible length",
            where="lengths",
            got=int(lengths[row]),
            expected=f"1 to {tokens.shape[1]}, the width of tokens",
            hint="give every row at least one token",
        )
    valid = np.arange(tokens.shape[1])[None] < lengths[:, None]
    check_vocabulary(tokens, config, where="tokens", valid=valid)
    return int(lengths.max())
