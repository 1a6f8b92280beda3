"""What the warpgroups of a thread block share: their part of the work, the weight ring, and signals to other blocks.

A thread block streams stages of `rows` gathered weight rows by `cols` columns through a ring buffer in shared memory.
One warpgroup fills the ring (`producer`), one loads the other operand (`loader`), and the rest multiply (`consumer`):
weights go from shared memory to registers as wgmma's left operand, and the batch is its N.
  up:   part[tile, 64 neurons, batch] += W[rows, cols] · x[cols, batch]
  down: part[tile, 64 columns, batch] += W[rows, cols]ᵀ · hidden[rows, batch]
`schedule.Split` divides the units of a product evenly among the blocks. The partial sums of a tile are added later, in
a fixed order, by XLA or by the same kernel. In the fused kernel, loaders turn the sums of each 64 neurons into hidden
values as soon as they can (`hidden`). A block takes its first hidden values one by one, and the others once all blocks
have completed theirs. At the end, all warpgroups add up the result (`Block.finish`).
A fused kernel waits on semaphores. With one multiplying warpgroup it waits on marks instead (`marks`), and its two
semaphores only count the blocks that have placed their marks and those whose hidden values are complete.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._inline import sync_warpgroup
from pallas_kernels.sparse_mlp.mosaic import marks, partials
from pallas_kernels.sparse_mlp.mosaic.call import Call
from pallas_kernels.sparse_mlp.schedule import Split
from pallas_kernels.sparse_mlp.tiles import HIDDEN_WIDTH

MATRICES = ("w_up", "w_gate", "w_down")
HIDDEN, MARKS, TILES = range(3)  # numbers of the first semaphores of a fused kernel: see `Call.semaphores`
RESULT = MARKS  # the same semaphore in kernels without marks


class Registers(NamedTuple):
    """Registers per lane, by role; at most 512 when added up over a thread block's warpgroups."""

    consumer: int
    producer: int
    loader: int


REGISTERS = {1: Registers(232, 104, 128), 2: Registers(192, 48, 80)}  # by number of multiplying warpgroups


class Block:
    """One thread block.

    Attributes:
      number: its index in the grid.
      call, tiles: what the kernel was compiled for.
      refs: the kernel's references by name; "x" is there if it computes the up-projection, "w_down" if the other.
      up, down: (first unit, end) of its share of each product.
      stages, up_stages: number of stages in all, and of the up-projection.
    """

    def __init__(self, call: Call, refs: dict[str, Any], interpret: bool):
        self.call, self.tiles, self.refs, self.interpret = call, call.tiles, refs, interpret
        self.number = lax.axis_index("block")
        self.up = self._share(call.up, "x")
        self.down = self._share(call.down, "w_down")
        self.up_stages = (self.up[1] - self.up[0]) * jnp.int32(call.tiles.groups)
        self.stages = self.up_stages + self.down[1] - self.down[0]

    def _share(self, split: Split, needs: str) -> tuple[jax.Array, jax.Array]:
        if needs not in self.refs:
            return jnp.int32(0), jnp.int32(0)
        return split.start(self.number), split.start(self.number + 1)  # pyrefly: ignore[bad-return]

    @property
    def registers(self) -> Registers:
        """Registers of each role's lanes."""
        return REGISTERS[self.tiles.warpgroups]

    # Signals between blocks

    def wait(self, semaphore, value) -> None:
        """Waits until a semaphore has counted to `value`."""
        arrived = self.refs["arrived"].at[semaphore]
        plgpu.semaphore_wait(arrived, value, decrement=False, memory_scope="gpu")

    def arrive(self, semaphore, count: int = 1) -> None:
        """Signals all blocks that everything the calling warpgroup stored, or has waited for, is visible."""
        sync_warpgroup()
        plgpu.semaphore_signal(self.refs["arrived"].at[semaphore], count, memory_scope="gpu")

    def signal(self, semaphore) -> None:
        """Signals all blocks that the calling warpgroup's copies to device memory are complete."""
        plgpu.wait_smem_to_gmem(0)
        plgpu.semaphore_signal(self.refs["arrived"].at[semaphore], memory_scope="gpu")

    def await_marks(self) -> None:
        """Waits until every block has placed its marks."""
        if self.tiles.marked:
            self.wait(MARKS, self.call.grid)

    # The ring of weights. Stage t is in slot t % stages; those of the up-projection come first.

    def slot(self, t):
        """The ring slot of stage t."""
        return lax.rem(t, jnp.int32(self.tiles.stages))

    def locate(self, t) -> tuple[jax.Array, ...]:
        """(position in `MATRICES`, first index entry, first column) of a stage."""
        if "w_down" not in self.refs:
            return self._locate_up(t)
        if "x" not in self.refs:
            return self._locate_down(t)
        going_up = t < self.up_stages
        both = zip(self._locate_up(t), self._locate_down(t), strict=True)
        return tuple(lax.select(going_up, up, down) for up, down in both)

    def _locate_up(self, t):
        m = self.tiles.groups
        unit = self.up[0] + lax.div(t, jnp.int32(m))
        tile, chunk = self.tile_chunk(self.call.up, unit)
        entry = self.first_entry(tile) + lax.rem(t, jnp.int32(m)) * self.tiles.rows
        return lax.div(tile, jnp.int32(self.call.row_tiles)), entry, chunk * self.tiles.cols

    def first_entry(self, tile):
        """The first index entry of an up-projection tile."""
        return lax.rem(tile, jnp.int32(self.call.row_tiles)) * (self.tiles.groups * self.tiles.rows)

    def _locate_down(self, t):
        tile, chunk = self.tile_chunk(self.call.down, self.down[0] + t - self.up_stages)
        return jnp.int32(MATRICES.index("w_down")), chunk * self.tiles.rows, tile * self.tiles.cols

    def tile_chunk(self, split: Split, unit):
        """(tile, chunk) of a unit of a product."""
        return lax.div(unit, jnp.int32(split.chunks)), lax.rem(unit, jnp.int32(split.chunks))

    # The block's share of a product, of the hidden values and of the result

    def for_each_part(self, split: Split, units, body: Callable[..., Any]) -> None:
        """Runs body(number of the partial sum, tile, first unit, end) for each tile that this block touches."""
        first = lax.div(units[0], jnp.int32(split.chunks))
        last = lax.div(lax.max(units[1] - 1, units[0]), jnp.int32(split.chunks))

        @pl.loop(0, lax.select(units[1] > units[0], last - first + 1, jnp.int32(0)))
        def _(part):
            tile = first + part
            start = lax.max(units[0], tile * split.chunks)
            end = lax.min(units[1], (tile + 1) * split.chunks)
            body(self.number * split.max_parts + part, tile, start, end)

    @property
    def pieces(self) -> tuple[int, int]:
        """(pieces, columns of a piece) in which the hidden values of 64 neurons are completed."""
        width = min(self.tiles.batch, HIDDEN_WIDTH)
        return self.tiles.batch // width, width

    def for_each_piece(self, body: Callable[..., Any]) -> None:
        """Runs body(block of 64 neurons, piece) for this block's share of the hidden values."""
        pieces, grid = self.pieces[0], self.call.grid
        count = self.call.hidden[0] * pieces

        @pl.loop(0, lax.div(jnp.int32(count - 1) - self.number + jnp.int32(grid), jnp.int32(grid)))
        def _(i):
            piece = self.number + i * grid
            body(lax.div(piece, jnp.int32(pieces)), lax.rem(piece, jnp.int32(pieces)))

    def finish(self, warpgroup, registers: int = 48) -> None:
        """In a fused kernel, adds up this warpgroup's share of the result as its partial sums arrive.

        registers: how many a lane may use for loads in flight; more makes the compiler spill.
        """
        call, tiles = self.call, self.tiles
        if not tiles.fused:
            return
        most, workers = call.down.contributions.shape[1], call.grid * (tiles.warpgroups + 2)
        items = call.d_model // 64 * call.result_fours
        ahead = max(1, min(-(-items // workers), registers // (4 * most)))
        take = marks.await_words if tiles.marked else partials.load_words
        if not tiles.marked:
            self.wait(RESULT, call.grid * tiles.warpgroups)
        add_up = partials.add_up(call.down, tiles.cols, call.kind, ahead, take, workers, items)
        add_up(self.refs["down_parts"], self.refs["out"], self.number * (tiles.warpgroups + 2) + warpgroup)
