"""Adversarial small calls of decode attention, which must be right on a GPU before anything is timed."""

import functools
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bench.attention_table import error
from pallas_kernels import _device
from pallas_kernels.decode_attention import mosaic, reference
from pallas_kernels.decode_attention.tiles import Tiles

LIMIT = {"bfloat16": 8e-3, "float16": 2e-3}  # |out - oracle| / |oracle|, both as vectors


@dataclass(frozen=True)
class Operands:
    """One call's arrays; `index` is None for dense."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    index: jax.Array | None

    def rows(self, rows: Sequence[int]) -> "Operands":
        pick = jnp.asarray(rows)
        index = None if self.index is None else self.index[pick]
        return Operands(self.q[pick], self.k[pick], self.v[pick], self.lengths[pick], index)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A small adversarial call: shapes, lengths, entries of the index (None = dense), tiles (None = heuristic)."""

    groups: int = 4
    queries: int = 1
    width: int = 128
    capacity: int = 328
    lengths: tuple[int, ...] = (0, 1, 63, 64, 65, 328)
    index: tuple[tuple[int, ...], ...] | None = (
        (3, 0, -1),
        (0, 1, 2),
        (-1, -1, -1),
        (2, 2, 1),
        (1, -1, 3),
        (0, 3, 1),
    )
    dtype: str = "bfloat16"
    window: int | None = None
    tiles: Tiles | None = None


def checks() -> Iterable[Check]:
    """The checks that must pass before anything is timed."""
    for i, width in enumerate((32, 64, 80, 96, 128, 256)):
        yield Check(width=width, dtype=("bfloat16", "float16")[i % 2], queries=1 + i)
        yield Check(width=width, dtype=("float16", "bfloat16")[i % 2], window=100)
    for splits in (1, 2, 3, 4, 8):
        yield Check(tiles=Tiles(block=64, stages=3, splits=splits), queries=4)
        yield Check(tiles=Tiles(block=64, stages=2, splits=splits), index=None, window=37)
    yield Check(tiles=Tiles(block=128, stages=3), queries=8)
    yield Check(tiles=Tiles(block=128, stages=1, splits=2), queries=16)
    for block in (64, 128, 256):  # more thread blocks than multiprocessors: the longest sequences come first
        lengths = (0, 1, 129, 64, 65, 328, 300, 192)
        yield Check(groups=40, lengths=lengths, index=None, tiles=Tiles(block=block, stages=1))
    yield Check(queries=12, width=64, index=None)
    yield Check(groups=1, index=None, queries=7)


def poisoned(check: Check) -> Operands:
    """The call's operands, with NaN in everything that must not influence the result."""
    rng = np.random.default_rng(zlib.crc32(repr(check).encode()))
    batch = len(check.lengths)
    shape = (batch, check.groups, check.capacity, check.width)
    q = rng.standard_normal((batch, check.groups, check.queries, check.width), np.float32)
    k, v = (rng.standard_normal(shape, np.float32) for _ in range(2))
    for row, length in enumerate(check.lengths):
        start = 0 if check.window is None else max(0, length - check.window)
        skipped = [] if check.index is None else [g for g in range(check.groups) if g not in check.index[row]]
        for cache in (k, v):
            cache[row, :, length:] = np.nan
            cache[row, :, :start] = np.nan
            cache[row, skipped] = np.nan
        q[row, skipped] = np.nan
    dtype = jnp.dtype(check.dtype)
    index = None if check.index is None else jnp.asarray(check.index, jnp.int32)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    return Operands(q, k, v, jnp.asarray(check.lengths, jnp.int32), index)


def run_checks() -> bool:
    """Prints one line per check; True if all are right."""
    right = True
    for check in checks():
        started = time.perf_counter()
        operands = poisoned(check)
        call = kernel_call(check.width**-0.5, check.window, check.tiles)
        out = np.asarray(jax.jit(call)(*vars(operands).values()).astype(jnp.float32))
        with jax.default_device(jax.devices("cpu")[0]):
            here = [None if x is None else np.asarray(x) for x in vars(operands).values()]
            oracle = functools.partial(
                reference.sparse_decode_attention, scale=check.width**-0.5, window=check.window
            )
            want = np.asarray(jax.jit(oracle)(*here))
        found = error(out, want)
        fine = found <= LIMIT[check.dtype] and bool((out[want == 0] == 0).all())
        right &= fine
        seconds = time.perf_counter() - started
        print(f"{'ok  ' if fine else 'FAIL'} {found:8.1e} {seconds:5.1f}s {_brief(check)}", flush=True)
    return right


def _brief(check: Check) -> str:
    given = {name: value for name, value in vars(check).items() if value != getattr(Check, name, None)}
    return ", ".join(f"{name}={value}" for name, value in given.items()) or "defaults"


def kernel_call(
    scale: float, window: int | None = None, tiles: Tiles | None = None
) -> Callable[..., jax.Array]:
    return functools.partial(
        mosaic.sparse_decode_attention, scale=scale, window=window, tiles=tiles, device=_device.current()
    )
