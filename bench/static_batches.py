"""Runs a trace in static batches: in the order of arrival, and each batch waits for its longest row."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import polarjax as pj
from bench.trace import Wish, most
from polarjax.generation.batch import bucket_length
from polarjax.generation.generate import start, write
from polarjax.generation.token_loop import CHUNK
from polarjax.selection.selectors import Sparsity


class Batches(NamedTuple):
    """A trace that was run.

    Attributes:
      seconds: of all batches.
      tokens: new tokens of each request.
      failed: rows whose logits were not finite.
      steps: decoding steps of all rows, whether they still ran or not.
    """

    seconds: float
    tokens: list[int]
    failed: int
    steps: int


def run(bundle: pj.Bundle, trace: Sequence[Wish], size: int, *, dense: bool) -> Batches:
    """Batches of `size`, as `pj.generate` makes them: one room for new tokens, prompts padded to a bucket.

    A row ends when it has its own number of tokens, as it would at a stop id, and reads no cache from then on.
    """
    skip = bundle.sparsity_by_batch(None if dense else "auto")
    tokens, failed, steps = [], 0, 0
    started = time.perf_counter()
    for batch in batches(trace, size):
        limits = [wish.new for wish in batch]
        made = _batch(bundle.model, batch, limits, most(trace)[1], skip(len(batch)))
        lengths, bad = jax.device_get((made.lengths, made.failed))
        tokens += lengths.tolist()
        failed += int(np.sum(bad))
        steps += len(batch) * -(-(max(limits) - 1) // CHUNK) * CHUNK
    return Batches(time.perf_counter() - started, tokens, failed, steps)


def batches(trace: Sequence[Wish], size: int) -> list[Sequence[Wish]]:
    """The trace in batches, in its own order."""
    return [trace[first : first + size] for first in range(0, len(trace), size)]


def warm_up(bundle: pj.Bundle, trace: Sequence[Wish], size: int, *, dense: bool) -> None:
    """Compiles every program that `run` needs, and decodes next to nothing."""
    skip = bundle.sparsity_by_batch(None if dense else "auto")
    positions = bundle.model.config.max_positions
    shapes = {(len(batch), bucket_length(most(batch)[0], positions)): batch for batch in batches(trace, size)}
    for batch in shapes.values():
        made = _batch(bundle.model, batch, [2] * len(batch), most(trace)[1], skip(len(batch)))
        jax.block_until_ready(made)


def _batch(
    model: pj.Decoder, batch: Sequence[Wish], limits: list[int], room: int, sparsity: Sparsity | None
) -> Any:
    lengths = np.array([len(wish.prompt) for wish in batch], np.int32)
    tokens = np.zeros((len(batch), lengths.max()), np.int32)
    for row, wish in zip(tokens, batch, strict=True):
        row[: len(wish.prompt)] = wish.prompt
    started = start(
        model,
        tokens,
        lengths,
        None,
        where="bench",
        sampler=pj.Greedy(),
        max_new_tokens=room,
        stop_ids=(),
        repetition_penalty=1.0,
        num_return_sequences=1,
        logprobs=None,
        sparsity=sparsity,
        implementation=None,
    )
    rules = dataclasses.replace(started.rules, limit=jnp.asarray(limits, jnp.int32))
    given = (model, started.logits, started.cache, started.batch, rules, sparsity)
    return write(*given, room=started.room, implementation=None)[0]
