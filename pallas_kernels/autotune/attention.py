"""What the tuner needs to tune decode attention: operands, candidates, how to run one and how to check its result."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _device
from pallas_kernels.autotune import measure
from pallas_kernels.decode_attention import mosaic, reference
from pallas_kernels.decode_attention.tiles import OP, Problem, Tiles, heuristic, search_space

SIZES = ("batch", "groups", "queries", "width", "capacity")


@dataclass(frozen=True)
class Attention:
    """One call: its problem, dtype ("bfloat16" or "float16") and the device to measure it on."""

    problem: Problem
    dtype: str
    device: _device.Device
    op = OP

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        for name in SIZES:
            parser.add_argument(f"--{name}", type=int, required=True)
        parser.add_argument("--selected", type=int, help="groups per sequence; default: all (dense)")

    @classmethod
    def of(cls, args: argparse.Namespace, device: _device.Device) -> "Attention":
        """The call that the arguments describe; raises NotImplementedError or ValueError if the kernel cannot do it."""
        selected = args.groups if args.selected is None else args.selected
        problem = Problem(**{name: getattr(args, name) for name in SIZES}, selected=selected)
        if problem.selected > problem.groups:
            raise ValueError(f"selected must be at most groups; got {selected}, expected 1..{args.groups}")
        problem.require_supported()
        return cls(problem, args.dtype, device)

    @property
    def shapes(self) -> dict[str, int]:
        return dict(vars(self.problem))

    def stored(self, tiles: Tiles) -> dict[str, int]:
        return dict(vars(tiles))

    def candidates(self) -> Iterator[Tiles]:
        """The heuristic's configuration first, then the rest of the search space."""
        first = heuristic(self.problem, self.device)
        yield first
        yield from (tiles for tiles in search_space(self.problem, self.device) if tiles != first)

    @cached_property
    def operands(self) -> tuple[jax.Array, list[tuple[Any, ...]]]:
        """q, and enough sets of (k, v, lengths, index) that calls rotating through them miss the L2 cache."""
        p, rng = self.problem, np.random.default_rng(0)
        touched = p.batch * p.selected * p.capacity * p.width * 4
        shape = (p.batch, p.groups, p.capacity, p.width)
        keys = iter(jax.random.split(jax.random.key(0), 1 + 2 * measure.sets_needed(touched)))
        q = jax.random.normal(next(keys), (p.batch, p.groups, p.queries, p.width), self.dtype)
        lengths = jnp.full((p.batch,), p.capacity, jnp.int32)
        order = rng.random((p.batch, p.groups)).argsort(-1)[:, : p.selected].astype(np.int32)
        index = None if p.selected == p.groups else jnp.asarray(np.sort(order, -1))
        caches = (
            (jax.random.normal(one, shape, self.dtype), jax.random.normal(two, shape, self.dtype))
            for one, two in itertools.batched(keys, 2)
        )
        return q, [(k, v, lengths, index) for k, v in caches]

    @cached_property
    def want(self) -> np.ndarray:
        """The expected result of the first call."""
        q, sets = self.operands
        oracle = jax.jit(functools.partial(reference.sparse_decode_attention, scale=self._scale))
        return np.asarray(oracle(q, *sets[0]), np.float64)

    @property
    def _scale(self) -> float:
        return self.problem.width**-0.5

    def run(self, tiles: Tiles) -> Callable[[], Any]:
        call = functools.partial(
            mosaic.sparse_decode_attention, scale=self._scale, device=self.device, tiles=tiles
        )
        return measure.chained(call, *self.operands)

    def right(self, results: Any) -> bool:
        return measure.near(results[0], self.want)
