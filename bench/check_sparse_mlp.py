"""Checks of the selective MLP on a GPU: adversarial small calls against the float32 oracle, before anything is timed.

    python3 -m bench.check_sparse_mlp fused            the checks of one kind of kernel, in this process

`bench.bench_sparse_mlp check` runs all of them in several processes.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import timing
from pallas_kernels import _device
from pallas_kernels.sparse_mlp import reference
from pallas_kernels.sparse_mlp.mosaic import launch as mosaic
from pallas_kernels.sparse_mlp.tiles import BATCHES, Tiles, heuristic

LIMIT = {"bfloat16": 8e-3, "float16": 2e-3}  # |out - oracle| / |oracle|, both as vectors
KINDS = {"fused": 5, "split": 2}  # kind of kernel: how many processes check it
REPEATS = 60  # runs of two calls for each of two inputs; results differ in a bit only if there is a race


def kind(tiles: Tiles) -> str:
    return "fused" if tiles.fused else "split"


def brief(tiles: Tiles) -> str:
    """Kind, warpgroups, groups, columns x stages, input columns x slots."""
    shape = f"w{tiles.warpgroups} g{tiles.groups} {tiles.cols}x{tiles.stages} x{tiles.x_cols}x{tiles.x_slots}"
    return f"{kind(tiles)} {shape}"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A small adversarial call: shapes, number of absent entries, options, changes to the heuristic's tiles."""

    batch: int = 16
    d_model: int = 1024
    num_neurons: int = 1000
    selected: int = 256
    absent: int = 5
    activation: str = "relu"
    threshold: float = 0.0
    gated: bool = False
    bias: bool = True
    gate_bias: bool = True
    dtype: str = "bfloat16"
    change: dict[str, Any] = field(default_factory=dict)

    def tiles(self, which: str) -> Tiles:
        """The configuration of that kind to check."""
        shape = (min(self.batch, BATCHES[-1]), self.d_model, _device.HOPPER)
        tiles = heuristic(*shape, selected=self.selected, gated=self.gated)
        return replace(tiles, fused=which != "split", **self.change)


def checks(which: str) -> list[Check]:
    """The checks that must pass before a kind is timed: every code path once, shared paths for one kind only."""
    gated = {"activation": "silu", "gated": True}
    few = [
        Check(),
        Check(batch=100, selected=384, bias=False, **gated),
        Check(batch=1, d_model=640, selected=100, dtype="float16"),
        Check(absent=256),
        Check(selected=384, gated=True, bias=False, threshold=0.5),
        Check(num_neurons=20000, selected=12800, d_model=2048, batch=64),
    ]
    many = [
        Check(batch=1, selected=384, **gated),
        Check(batch=8, selected=384, dtype="float16", **gated),
        Check(batch=17, selected=384),
        Check(batch=33, selected=391, gate_bias=False, **gated),
        Check(batch=100, selected=391, gate_bias=False, **gated),
        Check(batch=17, selected=384, dtype="float16", bias=False, **gated),
        Check(batch=64, selected=384),
        Check(batch=64, selected=384, **gated),
        Check(batch=200, selected=384, dtype="float16"),
        Check(batch=200, selected=384, gated=True),
        Check(selected=384, gated=True, threshold=0.01),
        Check(batch=64, selected=384, gated=True, threshold=0.5, dtype="float16"),
        Check(batch=100, selected=384, threshold=0.5),
        Check(d_model=128, selected=100),
        Check(d_model=2560, selected=100),
        Check(selected=1, absent=0, batch=128),
        Check(selected=500, d_model=4096),
        Check(selected=500, d_model=4096, batch=64, **gated),
    ]
    changes = (
        (16, {"groups": 2}),
        (16, {"groups": 4}),
        (16, {"groups": 4, "cols": 512, "stages": 3, "x_cols": 256, "x_slots": 3}),
        (16, {"groups": 2, "warpgroups": 2, "stages": 3}),
        (32, {"groups": 4}),
        (64, {"groups": 4}),
        (64, {"groups": 2, "cols": 128, "stages": 10, "x_cols": 64}),
        (64, {"groups": 2, "warpgroups": 2, "stages": 2}),
        (128, {"groups": 2}),
        (16, {}),
        (64, {"groups": 4, "x_cols": 128, "x_slots": 3}),
    )
    others = [Check(batch=batch, d_model=2048, selected=640, change=change) for batch, change in changes]
    others += [replace(others[i], **gated) for i in (0, 5)]
    return few + (many + others if which == "fused" else [])


def poisoned(check: Check) -> dict[str, Any]:
    """The call's operands: permuted, repeated and absent entries; NaN in every row that is not selected."""
    rng = np.random.default_rng(zlib.crc32(repr(check).encode()))
    index = rng.choice(check.num_neurons, check.selected, replace=False).astype(np.int32)
    index[-1] = index[0]
    index[rng.choice(check.selected, check.absent, replace=False)] = -1
    unnamed = np.setdiff1d(np.arange(check.num_neurons), index)
    shape = (check.num_neurons, check.d_model)

    def draw(*shape, scale=1.0, poison=True):
        values = rng.standard_normal(shape, np.float32) * scale
        if poison:
            values[unnamed] = np.nan
        return values

    operands = {
        "x": draw(check.batch, check.d_model, poison=False),
        "w_up": draw(*shape, scale=shape[1] ** -0.5),
    }
    operands |= {"w_down": draw(*shape, scale=check.selected**-0.5)}
    if check.gated:
        operands["w_gate"] = draw(*shape, scale=shape[1] ** -0.5)
    if check.bias:
        operands |= {
            f"b_{name}": draw(shape[0]) for name in ("up", "gate")[: 1 + (check.gated and check.gate_bias)]
        }
    operands = {name: jnp.asarray(array, check.dtype) for name, array in operands.items()}
    return operands | {"index": jnp.asarray(index)}


def run_checks(which: str, share: int, shares: int) -> bool:
    """Prints one line for every `shares`-th check of a kind of kernel; True if all are right."""
    right = True
    for check in checks(which)[share::shares]:
        started = time.perf_counter()
        operands = poisoned(check)
        tiles = check.tiles(which)
        act = {"activation": check.activation, "threshold": check.threshold}
        options = act | {"tiles": tiles, "device": _device.current()}

        @jax.jit
        def run(x, operands, options=options):
            first = mosaic.sparse_mlp(x, **operands, **options)
            return first, mosaic.sparse_mlp(first, **operands, **options)

        with jax.default_device(jax.devices("cpu")[0]):
            oracle = jax.jit(functools.partial(reference.reference, **act))
            host = jax.tree.map(np.asarray, operands)
            x = host.pop("x")
            wants: dict[bytes, np.ndarray] = {}

        def want(x, wants=wants, oracle=oracle, host=host):
            x = np.asarray(x)
            with jax.default_device(jax.devices("cpu")[0]):
                return wants.setdefault(x.tobytes(), np.asarray(oracle(x, **host)))

        device = jax.device_put(host)
        inputs = [jnp.asarray(x), jnp.asarray(x[:, ::-1])]
        outs = [run(inputs[i % 2], device) for i in range(2 * REPEATS)]
        found = max(
            max(error(first, want(x)), error(second, want(first)))
            for x, (first, second) in zip(inputs, outs, strict=False)
        )
        alike = all(same_bits(out, outs[i % 2]) for i, out in enumerate(outs))
        verdict = "RACE" if not alike else "ok  " if found <= LIMIT[check.dtype] else "FAIL"
        right &= verdict == "ok  "
        seconds = time.perf_counter() - started
        print(f"{verdict} {found:8.1e} {seconds:5.1f}s {_given(check)} {brief(tiles)}", flush=True)
    return right


def _given(check: Check) -> str:
    given = {n: v for n, v in vars(check).items() if v != getattr(Check, n, None) and n != "change"}
    return ", ".join(f"{name}={value}" for name, value in given.items()) or "defaults"


def error(out: Any, want: Any) -> float:
    """|out - want| / |want| as vectors; infinite if any element is NaN or infinite."""
    out, want = np.asarray(out, np.float64), np.asarray(want, np.float64)
    if out.shape != want.shape or not np.isfinite(out).all():
        return float("inf")
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(out - want)) / norm if norm else float(np.abs(out).max())


@jax.jit
def same_bits(some: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> jax.Array:
    """Whether two lists of 16-bit arrays are equal bit by bit."""
    pairs = zip(some, others, strict=True)
    return jnp.stack([(a.view(jnp.uint16) == b.view(jnp.uint16)).all() for a, b in pairs]).all()


def check_kinds(kinds: Sequence[str], seconds: float) -> tuple[str, ...]:
    """The kinds of kernels that pass all checks; several processes check in parallel."""
    timing.require_gpu()
    started = time.monotonic()
    command = [sys.executable, "-m", "bench.check_sparse_mlp"]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        (which, subprocess.Popen([*command, which, str(i), str(KINDS[which])], **options))
        for which in kinds
        for i in range(KINDS[which])
    ]
    right = dict.fromkeys(kinds, 0)
    wrong = set()
    for which, process in running:
        try:
            output, _ = process.communicate(timeout=max(1.0, started + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nno result after {seconds:.0f} s"
        lines = output.strip().splitlines()
        right[which] += sum(line.startswith("ok") for line in lines)
        if process.returncode:
            wrong.add(which)
            print(f"{which}: exit {process.returncode}", *lines[-40:], sep="\n", flush=True)
    for which in kinds:
        print(f"{which}: {right[which]} of {len(checks(which))} right", flush=True)
    print(f"checked in {time.monotonic() - started:.0f} s", flush=True)
    return tuple(which for which in kinds if which not in wrong and right[which] == len(checks(which)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=tuple(KINDS))
    parser.add_argument(
        "share", type=int, nargs="?", default=0, help="which share of the checks to run, from 0"
    )
    parser.add_argument("shares", type=int, nargs="?", default=1, help="how many shares there are")
    args = parser.parse_args()
    timing.require_gpu()
    return int(not run_checks(args.which, args.share, args.shares))


if __name__ == "__main__":
    sys.exit(main())
