"""Divides the units of a product evenly among the thread blocks.

A product has `tiles` output tiles, each of `chunks` steps along the contraction; unit u is chunk u % chunks of tile
u // chunks. Block i of P computes units [i·U//P, (i+1)·U//P), which touch a few tiles. It writes one partial sum for
each tile that it touches, numbered tile - (first tile of block i).
All formulas work on Python ints and on traced int32.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jax import Array, lax

Int = int | Array


def _div(a: Int, b: int) -> Int:
    return a // b if isinstance(a, int) else lax.div(a, np.int32(b))


@dataclass(frozen=True)
class Split:
    """One product's division.

    Attributes:
      tiles, chunks: output tiles, and steps of the contraction in each.
      available: thread blocks that could run; at most one per unit does work.
    """

    tiles: int
    chunks: int
    available: int

    @property
    def units(self) -> int:
        return self.tiles * self.chunks

    @property
    def blocks(self) -> int:
        return min(self.available, self.units)

    def start(self, block: Int) -> Int:
        """The first unit of a block. Its range ends at `start(block + 1)`; ranges from `blocks` on are empty."""
        block = min(block, self.blocks) if isinstance(block, int) else lax.min(block, np.int32(self.blocks))
        return _div(block * self.units, self.blocks)

    def owner(self, unit: Int) -> Int:
        """The block that computes `unit`."""
        return _div((unit + 1) * self.blocks - 1, self.units)

    def first_tile(self, block: Int) -> Int:
        return _div(self.start(block), self.chunks)

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        ends = [int(self.start(i)) for i in range(self.blocks + 1)]
        return list(itertools.pairwise(ends))

    @property
    def max_units(self) -> int:
        """Number of units of the busiest block."""
        return max(end - begin for begin, end in self._ranges)

    @cached_property
    def max_parts(self) -> int:
        """The most tiles that one block touches."""
        return max((e - 1) // self.chunks - b // self.chunks + 1 for b, e in self._ranges)

    @cached_property
    def contributions(self) -> np.ndarray:
        """int32 [tiles, n]: for each tile the numbers (block · max_parts + part) of its partial sums, padded with -1."""
        rows = []
        for tile in range(self.tiles):
            owners = range(self.owner(tile * self.chunks), self.owner((tile + 1) * self.chunks - 1) + 1)
            rows.append([i * self.max_parts + tile - self.first_tile(i) for i in owners])
        table = np.full((self.tiles, max(map(len, rows))), -1, np.int32)
        for row, numbers in zip(table, rows, strict=True):
            row[: len(numbers)] = numbers
        return table
