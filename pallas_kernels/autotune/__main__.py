"""Measures the tiles of an operation on this machine's GPU and writes the best ones as JSON.

    python3 -m pallas_kernels.autotune sparse_decode_attention \\
        --batch 16 --groups 8 --queries 4 --width 128 --capacity 8192 --selected 2 --output tuned.json

Set PALLAS_KERNELS_TUNED=tuned.json to have calls of these shapes take what was found.
"""

import argparse
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _device
from pallas_kernels.autotune import measure, tuned
from pallas_kernels.decode_attention import mosaic, reference
from pallas_kernels.decode_attention.tiles import OP, Problem, Tiles, heuristic, search_space

LIMIT = 8e-3  # |out - oracle| / |oracle|, both as vectors


def candidates(problem: Problem, device: _device.Device) -> Iterator[Tiles]:
    """The heuristic's configuration, then the rest of the search space."""
    first = heuristic(problem, device)
    yield first
    yield from (tiles for tiles in search_space(problem, device) if tiles != first)


class Calls:
    """Operands of one problem on the device, as many as it takes to miss the L2, and what the first should give."""

    def __init__(self, problem: Problem, dtype: str, device: _device.Device) -> None:
        p, self.device = problem, device
        self.scale = p.width**-0.5
        touched = p.batch * p.selected * p.capacity * p.width * 4
        rng = np.random.default_rng(0)
        shape = (p.batch, p.groups, p.capacity, p.width)
        keys = iter(jax.random.split(jax.random.key(0), 1 + 2 * measure.sets_needed(touched)))
        self.q = jax.random.normal(next(keys), (p.batch, p.groups, p.queries, p.width), dtype)
        lengths = jnp.full((p.batch,), p.capacity, jnp.int32)
        order = rng.random((p.batch, p.groups)).argsort(-1)[:, : p.selected].astype(np.int32)
        index = None if p.selected == p.groups else jnp.asarray(np.sort(order, -1))
        self.sets = [
            (jax.random.normal(one, shape, dtype), jax.random.normal(two, shape, dtype), lengths, index)
            for one, two in itertools.batched(keys, 2)
        ]
        oracle = jax.jit(functools.partial(reference.sparse_decode_attention, scale=self.scale))
        self.want = np.asarray(oracle(self.q, *self.sets[0]), np.float64)

    def run(self, tiles: Tiles) -> Callable[[], Any]:
        call = functools.partial(
            mosaic.sparse_decode_attention, scale=self.scale, device=self.device, tiles=tiles
        )

        @jax.jit
        def chain(q, sets):
            first = last = call(q, *sets[0])
            for i in range(1, measure.CALLS):
                last = call(last, *sets[i % len(sets)])
            return first, last

        return functools.partial(chain, self.q, self.sets)

    def right(self, results: Any) -> bool:
        found = np.asarray(results[0].astype(jnp.float32), np.float64)
        return bool(np.linalg.norm(found - self.want) <= LIMIT * np.linalg.norm(self.want))


def tune(
    problem: Problem,
    dtype: str,
    *,
    device: _device.Device,
    calls: Any = None,
    timer: Callable[[Callable[[], Any]], tuple[float, float]] = measure.device_timer,
) -> tuned.Entry:
    """The entry of a file for one problem, measured on `device`."""
    calls = calls or Calls(problem, dtype, device)
    best = measure.search(
        candidates(problem, device),
        calls.run,
        right=calls.right,
        timer=timer,
        report=lambda t: print(t, flush=True),
    )
    return tuned.Entry(
        op=OP,
        device=device.kind,
        dtype=dtype,
        shapes=dict(vars(problem)),
        tiles=dict(vars(best.tiles)),
        time_us=best.seconds * 1e6,
        jax=jax.__version__,
        commit=_commit(),
    )


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when a file was written, 1 with one line on stderr where that can't be."""
    parser = argparse.ArgumentParser(
        prog="python3 -m pallas_kernels.autotune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", choices=(OP,))
    for name in ("batch", "groups", "queries", "width", "capacity"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--selected", type=int, help="groups a sequence; without it, all (dense)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--output", type=Path, required=True, help="JSON; entries for other calls stay in it")
    args = parser.parse_args(arguments)
    try:
        device = _device.current()
        _device.require_hopper(device)
        sizes = {name: getattr(args, name) for name in ("batch", "groups", "queries", "width", "capacity")}
        problem = Problem(**sizes, selected=args.selected or args.groups)
        problem.require_supported()
        entry = tune(problem, args.dtype, device=device)
        tuned.write(args.output, [entry])
    except (NotImplementedError, ValueError) as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {entry}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
