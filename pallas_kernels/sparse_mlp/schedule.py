"""Who computes what: an even split of the units of a product over the thread blocks.

A product consists of `tiles` output tiles, each of `chunks` steps along the contraction; unit u is chunk
u % chunks of tile u // chunks. Block i takes the units [i·U//P, (i+1)·U//P), which touch a few tiles; of each it
writes a partial sum, its part number being tile - (first tile of block i).
All formulae work on Python ints and on traced int32 alike.

`Walk` is the order in which a block takes its units of the down-projection, whose contraction runs over groups of
neurons, so that no block begins with what the up-projection computes last.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jax import Array, lax

Int = int | Array


def _div(a: Int, b: int) -> Int:
    return a // b if isinstance(a, int) else lax.div(a, np.int32(b))


def _scalars(*values: Int) -> list[np.int32 | Array]:
    return [np.int32(value) if isinstance(value, int) else value for value in values]


def _min(a: Int, b: Int) -> Int:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else lax.min(*_scalars(a, b))


def _max(a: Int, b: Int) -> Int:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else lax.max(*_scalars(a, b))


def _choose(condition: bool | Array, yes: Int, no: Int) -> Int:
    if isinstance(condition, bool):
        return yes if condition else no
    return lax.select(condition, *_scalars(yes, no))


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
        return _div(_min(block, self.blocks) * self.units, self.blocks)

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


@dataclass(frozen=True)
class Run:
    """Consecutive units of one tile: chunks begin:end of it, which a block takes from its `position`-th unit on."""

    tile: Int
    begin: Int
    end: Int
    position: Int


@dataclass(frozen=True)
class Walk:
    """The order of a block's units. Chunks from `early` on are completed late, so a run ends with its share of them.

    A block that touches two tiles takes the longer run first, whatever their order: it is the later at its late chunks.
    """

    split: Split
    early: int
    block: Int

    @property
    def _range(self) -> tuple[Int, Int]:
        return self.split.start(self.block), self.split.start(self.block + 1)

    @property
    def _second(self) -> Int:
        """First unit of the block's second tile, if it touches two."""
        return (_div(self._range[0], self.split.chunks) + 1) * self.split.chunks

    @property
    def swapped(self) -> bool | Array:
        """Whether the block touches two tiles and takes the second first."""
        (start, end), second = self._range, self._second
        return (end - second > second - start) & (end - second <= self.split.chunks)

    def run(self, tile: Int) -> Run:
        """The block's share of a tile that it touches."""
        (start, end), chunks = self._range, self.split.chunks
        first = _max(start, tile * chunks)
        last = _min(end, (tile + 1) * chunks)
        after = _choose(first == start, end - last, first - first)
        return Run(
            tile, first - tile * chunks, last - tile * chunks, _choose(self.swapped, after, first - start)
        )

    def locate(self, position: Int) -> tuple[Int, Int]:
        """(tile, chunk) of the block's `position`-th unit."""
        start, end = self._range
        moved = end - self._second  # units of the second tile
        swapped = _choose(position < moved, self._second + position, start + position - moved)
        tile = _div(_choose(self.swapped, swapped, start + position), self.split.chunks)
        run = self.run(tile)
        place, begin, late = position - run.position, self._early_before(run.begin), self.late(run)
        chunk = _choose(place < late, begin + place, self.early + run.begin - begin + place - late)
        return tile, chunk

    def late(self, run: Run) -> Int:
        """How many early chunks a run has, before its late ones."""
        return self._early_before(run.end) - self._early_before(run.begin)

    def _early_before(self, place: Int) -> Int:
        """Of the first `place` units of a tile, dealt evenly, those whose chunk is early."""
        return _div(place * self.early, self.split.chunks)

    def first_late(self) -> Int:
        """Position of the block's first unit with a late chunk."""
        start, _ = self._range
        tile = _div(start, self.split.chunks)
        return self.late(self.run(_choose(self.swapped, tile + 1, tile)))
