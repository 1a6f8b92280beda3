"""Device time of a call: many calls chained inside one jit, few host round trips, differences of two lengths."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _device

L2_BYTES = 60 * 2**20


def require_gpu() -> None:
    """Ends the program with one line where JAX's first device is not a Hopper GPU."""
    try:
        _device.require_hopper(_device.current())
    except NotImplementedError as reason:
        raise SystemExit(
            f"bench: {reason}. Mend: run it where there is one, with polarjax[cuda13]."
        ) from None


def chained(call: Callable[..., jax.Array], calls: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(x, sets) -> the first and the last of `calls` results, each call taking the one before and the next set.

    The result of a call must have the shape and dtype of its first operand; so no two calls overlap.
    """
    inner = jax.jit(call)

    def run(x: jax.Array, sets: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        first = last = inner(x, *sets[0])
        for i in range(1, calls):
            last = inner(last, *sets[i % len(sets)])
        return first, last

    return jax.jit(run)


def seconds_per_call(
    run: Callable[[], Any], calls: int, *, min_seconds: float = 0.02, repeats: int = 5
) -> tuple[float, float]:
    """Median and spread (max - min) over `repeats` of the time of one of the `calls` that `run` enqueues."""
    jax.block_until_ready(run())
    jax.block_until_ready(run())
    started = time.perf_counter()
    jax.block_until_ready(run())
    rounds = max(2, round(min_seconds / (time.perf_counter() - started)))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(rounds - 1):
            run()
        result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - started) / (rounds * calls))
    return statistics.median(times), max(times) - min(times)


def timeline(run: Callable[[], Any]) -> list[tuple[str, int, float, float]]:
    """(kernel, count, median microseconds, median microseconds between the one before and it), by name.

    Of three runs that the profiler watched. Empty where it saw no device.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(path)).planes if "/device:GPU" in p.name]
    seen: dict[str, list[tuple[float, float]]] = {}
    for line in (line for plane in planes for line in plane.lines if line.name.startswith("Stream")):
        end = None
        for event in sorted(line.events, key=lambda event: event.start_ns):
            gap = event.start_ns - (event.start_ns if end is None else end)
            seen.setdefault(event.name, []).append((event.duration_ns / 1e3, gap / 1e3))
            end = event.start_ns + event.duration_ns
    median = statistics.median
    return [
        (name, len(of), median(t for t, _ in of), median(gap for _, gap in of)) for name, of in seen.items()
    ]


def calls_needed(seconds: float) -> int:
    """How many calls to chain, of which each takes about so long."""
    return max(4, min(16, round(4e-4 / seconds)))


def speed(size: int, seconds: float, spread: float, peak: float) -> dict[str, float]:
    """The columns of a call that moves `size` bytes, beside a copy of `peak` bytes a second."""
    rate = size / seconds
    return {
        "time_us": seconds * 1e6,
        "spread_us": spread * 1e6,
        "gbps": rate / 1e9,
        "pct_peak": 100 * rate / peak,
    }


def sets_needed(touched_bytes: int) -> int:
    """How many operand sets to rotate so that a call finds nothing of its own in the L2."""
    return max(1, -(-4 * L2_BYTES // touched_bytes))


def copy_bandwidth(size: int = 2 * 2**30) -> float:
    """Bytes per second of a device-to-device copy of `size` bytes, reads and writes counted; see `require_gpu`."""
    require_gpu()
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    flip = jax.jit(lambda x: x ^ jnp.uint32(0x5A5A5A5A))
    seconds, _ = seconds_per_call(lambda: flip(x), 1, min_seconds=0.05)
    return 2 * x.nbytes / seconds


def read_bandwidth(size: int = 4 * 2**30) -> float:
    """Bytes per second of a sum over `size` bytes."""
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    total = jax.jit(lambda x: x.sum())
    seconds, _ = seconds_per_call(lambda: total(x), 1, min_seconds=0.05)
    return x.nbytes / seconds
