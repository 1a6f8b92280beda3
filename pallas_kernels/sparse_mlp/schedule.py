"""Who computes what: an even split of the units of a product over the thread blocks.

A product consists of `tiles` output tiles, each of `chunks` steps along the contraction; unit u is chunk
u % chunks of tile u // chunks. Block i takes the units [i·U//P, (i+1)·U//P), which touch a few tiles; of each it
writes a partial sum, its part number being tile - (first tile of block i).
All formulae work on Python ints and on traced int32 alike.
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
    """tiles, chunks: the product's units. available: thread blocks; no more of them work than there are units."""

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
        """First unit of a block; `start(block + 1)` is the end of its range, empty from `blocks` on."""
        block = min(block, self.blocks) if isinstance(block, int) else lax.min(block, np.int32(self.blocks))
        return _div(block * self.units, self.blocks)

    def owner(self, unit: Int) -> Int:
        """The block that computes a unit."""
        return _div((unit + 1) * self.blocks - 1, self.units)

    def first_tile(self, block: Int) -> Int:
        return _div(self.start(block), self.chunks)

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        ends = [int(self.start(i)) for i in range(self.blocks + 1)]
        return list(itertools.pairwise(ends))

    @property
    def max_units(self) -> int:
        """Units of the busiest block."""
        return max(end - begin for begin, end in self._ranges)

    @cached_property
    def max_parts(self) -> int:
        """Tiles that one block touches, at most."""
        return max((e - 1) // self.chunks - b // self.chunks + 1 for b, e in self._ranges)

    @cached_property
    def contributions(self) -> np.ndarray:
        """int32 [tiles, n]: flat numbers block · max_parts + part of the partial sums of a tile, -1 after the last."""
        rows = []
        for tile in range(self.tiles):
            owners = range(self.owner(tile * self.chunks), self.owner((tile + 1) * self.chunks - 1) + 1)
            rows.append([i * self.max_parts + tile - self.first_tile(i) for i in owners])
        table = np.full((self.tiles, max(map(len, rows))), -1, np.int32)
        for row, numbers in zip(table, rows, strict=True):
            row[: len(numbers)] = numbers
        return table
