"""What the warpgroups of a thread block have in common: their share of the work, the ring of weights, signals.

A thread block streams stages of `rows` gathered weight rows times `cols` columns through a ring in shared memory.
One warpgroup fills the ring (`producer`), one (the `loader`) brings the other operand, the rest multiply (`consumer`):
weights from shared memory to registers as wgmma's left operand, the batch as its N.
  up:   part[tile, 64 neurons, batch] += W[rows, cols] · x[cols, batch]
  down: part[tile, 64 columns, batch] += W[rows, cols]ᵀ · hidden[rows, batch]
`schedule.Split` deals the units of a product evenly to the blocks; the partial sums of a tile are added afterwards,
in a fixed order: by XLA, or by the same kernel. There, loaders turn each 64 neurons' sums into hidden values as soon as
they can (`hidden`); a block's first hidden values are taken one by one, the others once all blocks have completed
theirs; at last, all warpgroups add up the result (`Block.finish`).
What a fused kernel waits for is announced by semaphores; with one multiplying warpgroup, by marks (`marks`), and the
semaphores tell no more than that all blocks have made their marks, and have completed their hidden values.
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
HIDDEN, MARKS, TILES = range(3)  # what semaphores of a fused kernel count: see `Call.semaphores`
RESULT = MARKS  # of kernels without marks


class Registers(NamedTuple):
    """Of a lane, by role; the roles of a thread block have 512 together at most."""

    consumer: int
    producer: int
    loader: int


REGISTERS = {1: Registers(232, 104, 128), 2: Registers(192, 48, 80)}  # by multiplying warpgroups


class Block:
    """One thread block.

    number: which of all. call, tiles: what the kernel was made for. refs: its references by name; it multiplies up if
    there is an "x", down if there is a "w_down". up, down: (first unit, end) of its share of each product. stages: in
    all, of which up_stages go up.
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
        return split.start(self.number), split.start(self.number + 1)  # pyright: ignore[reportReturnType]

    @property
    def registers(self) -> Registers:
        """Of each role's lanes."""
        return REGISTERS[self.tiles.warpgroups]

    # What blocks tell each other

    def wait(self, semaphore, value) -> None:
        """Until a semaphore has counted to `value`."""
        arrived = self.refs["arrived"].at[semaphore]
        plgpu.semaphore_wait(arrived, value, decrement=False, memory_scope="gpu")

    def arrive(self, semaphore, count: int = 1) -> None:
        """Tells all blocks that what the calling warpgroup stored, or knows to be stored, is there."""
        sync_warpgroup()
        plgpu.semaphore_signal(self.refs["arrived"].at[semaphore], count, memory_scope="gpu")

    def signal(self, semaphore) -> None:
        """Tells all blocks that what the calling warpgroup copied to device memory is there."""
        plgpu.wait_smem_to_gmem(0)
        plgpu.semaphore_signal(self.refs["arrived"].at[semaphore], memory_scope="gpu")

    def await_marks(self) -> None:
        """Until every block has marked its places."""
        if self.tiles.marked:
            self.wait(MARKS, self.call.grid)

    # The ring of weights. Stage t lies in slot t % stages; those of the up-projection come first.

    def slot(self, t):
        """Where stage t lies."""
        return lax.rem(t, jnp.int32(self.tiles.stages))

    def locate(self, t) -> tuple[jax.Array, ...]:
        """(which of `MATRICES`, first entry of the index, first column) of a stage."""
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
        """First entry of the index of a tile going up."""
        return lax.rem(tile, jnp.int32(self.call.row_tiles)) * (self.tiles.groups * self.tiles.rows)

    def _locate_down(self, t):
        tile, chunk = self.tile_chunk(self.call.down, self.down[0] + t - self.up_stages)
        return jnp.int32(MATRICES.index("w_down")), chunk * self.tiles.rows, tile * self.tiles.cols

    def tile_chunk(self, split: Split, unit):
        """(tile, chunk) of a unit of a product."""
        return lax.div(unit, jnp.int32(split.chunks)), lax.rem(unit, jnp.int32(split.chunks))

    # Its share of a product, of the hidden values and of the result

    def for_each_part(self, split: Split, units, body: Callable[..., Any]) -> None:
        """body(number of the partial sum, its tile, first unit, end) for each tile that this block touches."""
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
        """(pieces in which 64 neurons' hidden values are completed, columns of each)."""
        width = min(self.tiles.batch, HIDDEN_WIDTH)
        return self.tiles.batch // width, width

    def for_each_piece(self, body: Callable[..., Any]) -> None:
        """body(block of 64 neurons, piece) for this block's share of the hidden values."""
        pieces, grid = self.pieces[0], self.call.grid
        count = self.call.hidden[0] * pieces

        @pl.loop(0, lax.div(jnp.int32(count - 1) - self.number + jnp.int32(grid), jnp.int32(grid)))
        def _(i):
            piece = self.number + i * grid
            body(lax.div(piece, jnp.int32(pieces)), lax.rem(piece, jnp.int32(pieces)))

    def finish(self, warpgroup, registers: int = 48) -> None:
        """In a fused kernel, once partial sums of the result are there: adds up this warpgroup's share.

        registers: for sums on their way; more makes the compiler spill.
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
