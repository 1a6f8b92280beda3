"""Device time of a call: chains many calls inside one jit and takes the device's own times from the profiler."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _device

L2_BYTES = 60 * 2**20


def require_gpu() -> None:
    """Exits with one line if JAX's first device is not a Hopper GPU."""
    try:
        _device.require_hopper(_device.current())
    except NotImplementedError as reason:
        raise SystemExit(
            f"bench: {reason}. Hint: run it on a machine with one, with polarjax[cuda13]."
        ) from None


def chained(call: Callable[..., jax.Array], calls: int) -> jax.stages.Wrapped:
    """Jitted (x, sets) -> the first and last of `calls` results; each call takes the previous result and the next set.

    The result of a call must have the shape and dtype of its first operand. That way no two calls overlap.
    """
    inner = jax.jit(call)

    def run(x: jax.Array, sets: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        first = last = inner(x, *sets[0])
        for i in range(1, calls):
            last = inner(last, *sets[i % len(sets)])
        return first, last

    return jax.jit(run)


class Timing(NamedTuple):
    """Time of one call in a chain, in seconds.

    device: how long the device was busy, by its own clock; median over runs. spread: its max - min over runs.
    wall: the time by the host's clock, including launches. launches: number of device activities per call.
    """

    device: float
    spread: float
    wall: float
    launches: float


class Event(NamedTuple):
    """One activity of a device; start and length in nanoseconds.

    `op` is the instruction of the compiled program that it belongs to, "" inside a CUDA graph.
    """

    start: float
    length: float
    name: str
    op: str = ""


def time_call(run: Callable[[], Any], calls: int, *, repeats: int = 5) -> Timing:
    """Time of one of the `calls` that each `run()` makes. Raises RuntimeError if the profiler sees no device."""
    for _ in range(2):
        jax.block_until_ready(run())
    started = time.perf_counter()
    jax.block_until_ready([run() for _ in range(repeats)])
    wall = (time.perf_counter() - started) / (repeats * calls)
    seen = events(run, repeats)
    if not seen or len(seen) % repeats:
        raise RuntimeError(f"the profiler saw {len(seen)} events of the device in {repeats} equal runs")
    each = len(seen) // repeats
    times = [busy(seen[first : first + each]) / calls for first in range(0, len(seen), each)]
    return Timing(statistics.median(times), max(times) - min(times), wall, each / calls)


def events(run: Callable[[], Any], repeats: int) -> list[Event]:
    """What the first GPU did in `repeats` consecutive runs, sorted by start."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(repeats):
                jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = [
            p for p in jax.profiler.ProfileData.from_file(str(path)).planes if "/device:GPU:0" in p.name
        ]
        lines = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
        found = [e for line in lines for e in line.events]
        return sorted(
            Event(e.start_ns, e.duration_ns, e.name, dict(e.stats).get("hlo_op", "")) for e in found
        )


def busy(seen: Sequence[Event]) -> float:
    """Seconds in which at least one of the events (sorted by start) was running."""
    total, until = 0.0, float("-inf")
    for event in seen:
        end = event.start + event.length
        total += max(0.0, end - max(event.start, until))
        until = max(until, end)
    return total / 1e9


def timeline(run: Callable[[], Any]) -> list[tuple[str, int, float, float]]:
    """(kernel, count, median microseconds, median gap before it in microseconds), by name, over three runs."""
    jax.block_until_ready(run())
    found: dict[str, list[tuple[float, float]]] = {}
    end = None
    for event in events(run, 3):
        gap = event.start - (event.start if end is None else end)
        found.setdefault(event.name, []).append((event.length / 1e3, gap / 1e3))
        end = event.start + event.length
    median = statistics.median
    return [
        (name, len(of), median(t for t, _ in of), median(gap for _, gap in of)) for name, of in found.items()
    ]


def calls_needed(seconds: float) -> int:
    """How many calls to chain if each takes about this long."""
    return max(4, min(16, round(4e-4 / seconds)))


def speed(size: int, timing: Timing, peak: float) -> dict[str, float]:
    """The columns for a call that moves `size` bytes, relative to a copy at `peak` bytes per second."""
    rate = size / timing.device
    return {
        "time_us": timing.device * 1e6,
        "spread_us": timing.spread * 1e6,
        "wall_us": timing.wall * 1e6,
        "gbps": rate / 1e9,
        "pct_peak": 100 * rate / peak,
    }


def sets_needed(touched_bytes: int) -> int:
    """How many operand sets to rotate so that a call finds none of its data in the L2 cache."""
    return max(1, -(-4 * L2_BYTES // touched_bytes))


def copy_bandwidth(size: int = 2 * 2**30) -> float:
    """Bytes per second, reads plus writes, of a device-to-device copy of `size` bytes; needs a GPU (`require_gpu`)."""
    require_gpu()
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    flip = jax.jit(lambda x: x ^ jnp.uint32(0x5A5A5A5A))
    return 2 * x.nbytes / time_call(lambda: flip(x), 1).device


def read_bandwidth(size: int = 4 * 2**30) -> float:
    """Bytes per second of a sum over `size` bytes."""
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    total = jax.jit(lambda x: x.sum())
    return x.nbytes / time_call(lambda: total(x), 1).device
