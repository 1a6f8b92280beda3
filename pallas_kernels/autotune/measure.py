"""Measures configurations on the device, the heuristic's first, and picks the fastest."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CALLS = 8  # chained in one program
LIMIT = 8e-3  # largest |out - oracle| / |oracle|, as norms of vectors
L2_BYTES = 60 * 2**20


@dataclass(frozen=True)
class Trial:
    """One measured configuration: median and spread of its seconds per call, or why it failed (`failure`)."""

    tiles: Any
    seconds: float = float("inf")
    spread: float = 0.0
    failure: str = ""

    def __str__(self) -> str:
        return f"{self.tiles}: " + (self.failure or f"{self.seconds * 1e6:.1f} us ± {self.spread * 1e6:.1f}")


def search(
    candidates: Iterable[Any],
    run: Callable[[Any], Callable[[], Any]],
    *,
    right: Callable[[Any], bool],
    timer: Callable[[Callable[[], Any]], tuple[float, float]],
    report: Callable[[Trial], None] = lambda trial: None,
) -> Trial:
    """Measures all candidates and returns the best trial.

    The first candidate is what would be used without a search. Another one replaces the best so far only if it is
    faster by more than both spreads together. A candidate that is wrong or raises is never chosen.

    Args:
      candidates: configurations.
      run: returns a function that makes one call with a configuration.
      right: whether a result is correct.
      timer: measures a function; returns (seconds, spread).
      report: called with every trial.

    Raises:
      ValueError: no candidate gave a correct result.
    """
    best: Trial | None = None
    for tiles in candidates:
        trial = _try(tiles, run, right, timer)
        report(trial)
        if trial.failure:
            continue
        if best is None or best.seconds - trial.seconds > best.spread + trial.spread:
            best = trial
    if best is None:
        raise ValueError("autotune: no configuration gave a correct result; expected at least one")
    return best


def _try(tiles: Any, run, right, timer) -> Trial:
    try:
        call = run(tiles)
        if not right(call()):
            return Trial(tiles, failure="wrong result")
        seconds, spread = timer(call)
    except Exception as error:  # reported and skipped: a configuration that cannot run
        text = next(iter(str(error).splitlines()), "")[:120]
        return Trial(tiles, failure=f"{type(error).__name__}: {text}")
    return Trial(tiles, seconds, spread)


def near(found: jax.Array, want: np.ndarray) -> bool:
    """Whether a result is within `LIMIT` of the oracle's."""
    got = np.asarray(found.astype(jnp.float32), np.float64)
    return bool(np.linalg.norm(got - want) <= LIMIT * np.linalg.norm(want))


def chained(call: Callable[..., jax.Array], x: jax.Array, sets: Sequence[Any]) -> Callable[[], Any]:
    """-> f(): the first and the last of CALLS results; each call takes the previous result as `x` and the next set."""

    @jax.jit
    def run(x: jax.Array, sets: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        first = last = call(x, *sets[0])
        for i in range(1, CALLS):
            last = call(last, *sets[i % len(sets)])
        return first, last

    return functools.partial(run, x, sets)


def sets_needed(touched_bytes: int) -> int:
    """How many sets of operands a chain of calls must cycle through so that none is still in the L2 cache."""
    return max(1, min(64, -(-4 * L2_BYTES // touched_bytes)))


def host_timer(run: Callable[[], Any], *, calls: int = CALLS, repeats: int = 5) -> tuple[float, float]:
    """Seconds per call, by the host's clock, for a `run` that enqueues `calls`: median and spread (max - min)."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _ in range(9):
            run()
        jax.block_until_ready(run())
        times.append((time.perf_counter() - started) / (10 * calls))
    return statistics.median(times[1:]), max(times[1:]) - min(times[1:])
