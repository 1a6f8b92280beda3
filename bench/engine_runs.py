"""Runs a trace through `pj.Engine` and measures it: what it did, how long its rows waited, what its calls take alone."""

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import polarjax as pj
from bench.trace import Wish
from polarjax.generation.batch import bucket_length
from polarjax.generation.token_loop import CHUNK
from polarjax.numeric import spread

SAMPLES = 12  # calls of a kind that are run alone
REPEATS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A program that the engine sent to the device.

    Attributes:
      lengths: positions that the running rows have in the cache; None if the program reads prompts.
      waiting: whether requests waited for a slot.
      taken: slots with a request.
      counts: new tokens of each row, int32 [B], on the device.
      again: sends the same program with the same operands to the slots as they are then.
    """

    lengths: list[int] | None
    waiting: bool
    taken: int
    counts: Any
    again: Callable[[], Any]


class WatchedEngine(pj.Engine):
    """An engine that keeps a record of what it sends to the device."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[Call] = []
        super().__init__(*args, **kwargs)

    def _call(self, program, *args: Any, **kwargs: Any):
        decodes = "steps" in kwargs
        running = self._running.values() if decodes else ()
        lengths = [len(request.prompt) + request.drawn - 1 for request in running]
        again = functools.partial(super()._call, program, *args, **kwargs)
        drawn = again()
        known = (lengths if decodes else None, self.waiting > 0, self.in_use)
        self.calls.append(Call(*known, drawn.counts, again))
        return drawn

    def stand(self, lengths: Sequence[int]) -> None:
        """Makes rows run that have so many positions in the cache; what is in it doesn't matter."""
        slots = self._slots
        assert slots is not None
        column = np.zeros(self.slots, np.int32)
        column[: len(lengths)] = lengths
        limit = np.where(np.arange(self.slots) < len(lengths), np.int32(2**30), np.int32(0))
        none = jnp.zeros(self.slots, bool)
        state = dataclasses.replace(
            slots.state,
            stopped=none,
            failed=none + False,
            lengths=jnp.zeros(self.slots, jnp.int32),
            cache=dataclasses.replace(slots.state.cache, length=jnp.asarray(column)),
        )
        rules = dataclasses.replace(slots.rules, limit=jnp.asarray(limit))
        self._slots = dataclasses.replace(slots, rules=rules, state=state)

    def seconds_of(self, call: Call) -> float:
        """How long the device takes for a call when it does nothing else."""
        self.stand(call.lengths or ())
        jax.block_until_ready(call.again())
        started = time.perf_counter()
        for _ in range(REPEATS):
            call.again()
        jax.block_until_ready(self._slots)
        return (time.perf_counter() - started) / REPEATS


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trace that was run.

    Attributes:
      seconds: from the first submission to the last event.
      tokens: new tokens of each request, by its place in the trace.
      endings: how many requests ended how.
      gap: longest time between two events with tokens of the same request, in seconds.
      calls: what was sent to the device.
    """

    seconds: float
    tokens: list[int]
    endings: Counter[str]
    gap: float
    calls: list[Call]


def run(engine: WatchedEngine, trace: Sequence[Wish]) -> Run:
    """Submits all requests and takes their events."""
    engine.calls.clear()
    tokens: dict[int, int] = {}
    latest: dict[int, float] = {}
    endings: Counter[str] = Counter()
    gap = 0.0
    started = time.perf_counter()
    for wish in trace:
        tokens[engine.submit(wish.prompt, max_new_tokens=wish.new, stop_ids=())] = 0
    for event in engine:
        now = time.perf_counter()
        if event.tokens:
            gap = max(gap, now - latest.get(event.request, now))
            latest[event.request] = now
            tokens[event.request] += len(event.tokens)
        if event.finished:
            endings[event.finished] += 1
    seconds = time.perf_counter() - started
    return Run(seconds, list(tokens.values()), endings, gap, list(engine.calls))


def shares(calls: Sequence[Call], slots: int) -> dict[str, float | None]:
    """How full the slots were while requests waited.

    rows_in_use_pct: slot-steps that drew a token, of all slot-steps. slots_taken_pct: slots that had a request, running
    or being read, when a chunk of steps was sent.
    """
    full = [call for call in calls if call.lengths is not None and call.waiting]
    if not full:
        return {"rows_in_use_pct": None, "slots_taken_pct": None}
    drew = sum(int(np.sum(counts)) for counts in jax.device_get([call.counts for call in full]))
    taken = sum(call.taken for call in full)
    return {
        "rows_in_use_pct": 100 * drew / (len(full) * slots * CHUNK),
        "slots_taken_pct": 100 * taken / (len(full) * slots),
    }


def seconds_alone(engine: WatchedEngine, calls: Sequence[Call]) -> float:
    """How long all these calls take one after the other without the host: calls spread evenly stand for the rest."""
    picked = [calls[i] for i in spread(len(calls), SAMPLES)]
    return len(calls) * float(np.mean([engine.seconds_of(call) for call in picked])) if picked else 0.0


def measured(engine: WatchedEngine, done: Run) -> dict[str, Any]:
    """The columns of a run; see bench/README.md."""
    chunks = [call for call in done.calls if call.lengths is not None]
    reads = [call for call in done.calls if call.lengths is None]
    full = [call for call in chunks if call.waiting] or chunks
    steps, prompts = seconds_alone(engine, chunks), seconds_alone(engine, reads)
    chunk = seconds_alone(engine, full) / max(1, len(full))
    engine.stand(())
    return {
        **shares(done.calls, engine.slots),
        "mean_rows": float(np.mean([len(call.lengths or ()) for call in chunks])) if chunks else 0.0,
        "chunks": len(chunks),
        "reads": len(reads),
        "chunk_ms": chunk * 1e3,
        "steps_s": steps,
        "reads_s": prompts,
        "pct_of_steps": 100 * steps / done.seconds,
        "pct_of_work": 100 * (steps + prompts) / done.seconds,
        "longest_gap_ms": done.gap * 1e3,
        "longest_gap_chunks": done.gap / chunk if chunk else None,
    }


def first_token(engine: WatchedEngine, vocab_size: int, length: int, repeats: int = 5) -> float:
    """Median seconds from the submission of a lone prompt, of other ids each time, to its first token."""
    rng, times = np.random.default_rng(length), []
    for _ in range(repeats + 1):
        prompt: Any = rng.integers(0, vocab_size, length)
        started = time.perf_counter()
        engine.submit(prompt, max_new_tokens=2 * CHUNK, stop_ids=())
        next(event for event in engine if event.tokens)
        times.append(time.perf_counter() - started)
        for _ in engine:
            pass
    return float(np.median(times[1:]))


def bare_prefill(model: pj.Decoder, length: int, repeats: int = 5) -> float:
    """Median seconds of `prefill` and an argmax for one prompt, padded as `generate` pads it."""
    config = model.config
    width = bucket_length(length, config.max_positions)
    tokens = np.random.default_rng(length).integers(0, config.vocab_size, (1, width), np.int32)
    lengths = jnp.full((1,), length, jnp.int32)
    cache = pj.init_cache(config, batch_size=1, capacity=-(-width // 8) * 8, dtype=model.dtype)

    @functools.partial(jax.jit, donate_argnames="cache")
    def read(model, tokens, lengths, cache):
        logits, cache = pj.prefill(model, tokens, lengths, cache)
        return jnp.argmax(logits, -1), cache

    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        token, cache = read(model, jax.device_put(tokens), lengths, cache)
        jax.device_get(token)
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))
