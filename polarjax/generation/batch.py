"""A batch of prompts and its generation rules, in the form that compiled programs take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from polarjax.configs import ModelConfig
from polarjax.generation import checks
from polarjax.generation.sampling import Categorical, Greedy, Sampler
from polarjax.generation.token_loop import FixedSampler, Rules
from polarjax.model.decoder import Decoder
from polarjax.model.spread_checks import check_batch
from polarjax.types import Array, Int

SMALLEST_BUCKET = 16
_STOP_IDS = 8  # initial room, doubled until all fit


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """A batch in the form that compiled programs take.

    Attributes:
      tokens: int32 [B bucket].
      lengths: int32 [B].
      capacity: positions that the cache needs.
      room: new tokens that the compiled program has room for.
    """

    tokens: Int[Array, "B bucket"]
    lengths: Int[Array, "B"]
    capacity: int
    room: int


def prepare(
    model: Decoder, tokens: Any, lengths: Any, *, where: str, max_new_tokens: int, copies: int = 1
) -> Prompts:
    """Checks prompts, repeats each `copies` times and pads them to their bucket; see `generate`."""
    config, sharding = model.config, _row_sharding(tokens, model)
    tokens, lengths = checks.as_batch(tokens, lengths)
    checks.check_prompts(config, tokens, lengths, max_new_tokens)
    capacity = -(-positions(config, tokens.shape[1], max_new_tokens) // 8) * 8
    bucket = bucket_length(tokens.shape[1], config.max_positions)
    tokens, lengths = _widen(tokens, lengths, bucket, copies)
    check_batch(model, None, tokens.shape[0], where=where)
    if sharding is not None and not isinstance(tokens, Tracer):
        tokens, lengths = jax.device_put((tokens, lengths), sharding)
    return Prompts(tokens, lengths, capacity, output_room(max_new_tokens))


def positions(config: ModelConfig, length: int, max_new_tokens: int) -> int:
    """Cache positions for prompts padded to `length` tokens and the tokens after them.

    The same for all counts with the same `output_room`, unless limited by the model's positions.
    """
    bucket = bucket_length(length, config.max_positions)
    return max(bucket, min(bucket + output_room(max_new_tokens), config.max_positions))


def bucket_length(length: int, limit: int) -> int:
    """The padded prompt length: the next power of two, at least 16 and at most `limit`."""
    return max(length, min(limit, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())))


def output_room(count: int) -> int:
    """Room for `count` new tokens: a power of two from 16 to 128, then a multiple of an eighth of the next one.

    Room costs cache memory, so beyond 128 tokens at most a quarter of it is unused.
    """
    power = max(SMALLEST_BUCKET, 1 << (count - 1).bit_length())
    step = power if power <= 128 else power // 8
    return -(-count // step) * step


def make_rules(
    key: Any,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: Any = (),
    repetition_penalty: Any = 1.0,
    best: int | None = None,
) -> Rules:
    """Checks settings and turns them into arrays, so that other values reuse the compiled program."""
    checks.check_sampler(sampler)
    key = None if key is None else checks.random_key(key)
    traced = type(sampler) in (Greedy, Categorical) or checks.holds_arrays(sampler)
    ids = checks.check_stop_ids(stop_ids)
    ids = ids if isinstance(ids, Tracer) else np.asarray(ids, np.int32)
    missing = max(_STOP_IDS, 1 << (ids.shape[0] - 1).bit_length()) - ids.shape[0]
    pad = jnp.pad if isinstance(ids, Tracer) else np.pad
    # Moved explicitly, for jax.transfer_guard.
    return jax.device_put(
        Rules(
            sampler if traced else FixedSampler(sampler),
            pad(ids, (0, missing), constant_values=-1),  # pyrefly: ignore[bad-argument-type]
            np.int32(max_new_tokens),  # pyrefly: ignore[bad-argument-type]
            key,
            checks.check_penalty(repetition_penalty),
            best=best,
        )
    )


def _widen(tokens, lengths, width: int, copies: int) -> tuple[Int[Array, "B width"], Int[Array, "B"]]:
    """Pads on the host if ids are concrete, since each T would otherwise compile a program."""
    xp = jnp if isinstance(tokens, Tracer) or isinstance(lengths, Tracer) else np
    tokens = xp.pad(xp.asarray(tokens), ((0, 0), (0, width - tokens.shape[1])))
    lengths = xp.asarray(lengths)
    if copies > 1:
        tokens, lengths = xp.repeat(tokens, copies, 0), xp.repeat(lengths, copies, 0)
    return jax.device_put((tokens.astype(np.int32), lengths.astype(np.int32)))


def _row_sharding(tokens: Any, model: Decoder) -> NamedSharding | None:
    """Sharding of the prompts' rows over the model's mesh, if the model or they are sharded."""
    layout = model.layout
    if layout is not None:
        return layout.sharding(PartitionSpec(layout.data))
    table = model.embed.tokens[...]
    if any(isinstance(each, Tracer) or not isinstance(each, jax.Array) for each in (tokens, table)):
        return None
    sharding = tokens.sharding
    spread = isinstance(sharding, NamedSharding) and sharding.device_set == table.sharding.device_set
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1])) if spread else None
