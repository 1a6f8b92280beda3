"""The loader: the warpgroup that loads the other operand of the products, first the input, then the hidden values."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_mlp.mosaic import hidden, marks
from pallas_kernels.sparse_mlp.mosaic.block import HIDDEN, MARKS, TILES, Block
from pallas_kernels.sparse_mlp.schedule import Split


def load(block: Block) -> None:
    """Loads the input and then the hidden values; in a fused kernel, computes its share of them in between."""
    plgpu.set_max_registers(block.registers.loader, action="decrease")
    if "x" in block.refs:
        _load_input(block)
    if block.tiles.fused:
        hidden.complete(block)
    if "w_down" in block.refs:
        _load_hidden(block)
    block.finish(block.tiles.warpgroups + 1)


def _load_input(block: Block) -> None:
    refs, tiles = block.refs, block.tiles
    pieces = tiles.cols // tiles.x_cols
    count = (block.up[1] - block.up[0]) * pieces
    first = lax.min(count, jnp.int32(tiles.x_slots))

    def wait(i):
        plgpu.barrier_wait(refs["x_empty"].at[lax.rem(i, jnp.int32(tiles.x_slots))])

    def bring(i):
        _, chunk = block.tile_chunk(block.call.up, block.up[0] + lax.div(i, jnp.int32(pieces)))
        column = chunk * tiles.cols + lax.rem(i, jnp.int32(pieces)) * tiles.x_cols
        slot = lax.rem(i, jnp.int32(tiles.x_slots))
        source, target = refs["x"].at[:, pl.ds(column, tiles.x_cols)], refs["x_ring"].at[slot]
        plgpu.copy_gmem_to_smem(source, target, refs["x_full"].at[slot])

    def refill(i):
        wait(i)
        bring(i)
        _announce_part(block, i - tiles.x_slots, pieces)

    pl.loop(0, first)(bring)
    if tiles.marked:
        _mark_places(block)
    pl.loop(first, count)(refill)
    block.await_marks()

    @pl.loop(count - first, count)
    def _(i):
        wait(i)
        _announce_part(block, i, pieces)


def _mark_places(block: Block) -> None:
    """Places marks wherever this block will store values; signals its consumers, then all blocks."""
    call, tiles, refs = block.call, block.tiles, block.refs
    _mark_parts(block, refs["up_parts"], call.up, block.up, tiles.groups * (tiles.batch // 8))
    plgpu.barrier_arrive(refs["marked"].at[0])  # the down-projection's sums wait for all blocks' marks anyway
    _mark_parts(block, refs["down_parts"], call.down, block.down, tiles.cols // 64 * call.result_fours)
    pieces, width = block.pieces
    mark = marks.fill(width // 16)
    block.for_each_piece(lambda neurons, piece: mark(refs["early"], neurons * pieces + piece))
    block.arrive(MARKS)


def _mark_parts(block: Block, parts, split: Split, units, fours: int) -> None:
    """Places marks for this block's partial sums of a product, each `fours` 4-word stores per thread."""
    mark = marks.fill(fours)
    block.for_each_part(split, units, lambda number, *_: mark(parts, number))


def _announce_part(block: Block, piece, pieces: int) -> None:
    """Announces the previous tile's partial sums when the consumers have read a tile's first piece of input.

    By then those sums are stored. The consumers do not have to wait until the stores are visible to all blocks.
    """
    if not block.tiles.fused or block.tiles.marked:
        return
    unit = block.up[0] + lax.div(piece, jnp.int32(pieces))
    tile, chunk = block.tile_chunk(block.call.up, unit)
    begins = (lax.rem(piece, jnp.int32(pieces)) == 0) & (chunk == 0) & (unit > block.up[0])
    pl.when(begins)(lambda: block.arrive(TILES + tile - 1, block.tiles.warpgroups))


def _load_hidden(block: Block) -> None:
    refs, slots, early = block.refs, block.tiles.hidden_slots, block.tiles.marked
    count = block.down[1] - block.down[0]
    first = lax.min(count, jnp.int32(slots)) if early else jnp.int32(0)
    if early:
        once = lax.min(first, jnp.int32(1))
        _take_early(block, jnp.int32(0), once)
        block.signal(HIDDEN)  # as early as possible, because other blocks wait for it
        _take_early(block, once, first)

    def wait(i):
        plgpu.barrier_wait(refs["h_empty"].at[lax.rem(i, jnp.int32(slots))])

    @pl.loop(first, count)
    def _(i):
        pl.when(i >= slots)(lambda: wait(i))
        _, group = block.tile_chunk(block.call.down, block.down[0] + i)
        if early:
            pl.when(i == slots)(lambda: block.wait(HIDDEN, block.call.grid))
        elif block.tiles.fused:
            _await_hidden(block, i, group)
        slot, per = lax.rem(i, jnp.int32(slots)), block.tiles.warpgroups
        source = refs["hidden"].at[pl.ds(group * per, per)]
        plgpu.copy_gmem_to_smem(source, refs["h_ring"].at[slot], refs["h_full"].at[slot])

    pl.loop(lax.max(count - slots, jnp.int32(0)), count)(wait)


def _await_hidden(block: Block, i, group) -> None:
    """Waits for the i-th hidden values, those of `group`: the first few one by one, the rest all at once."""
    call, slots = block.call, block.tiles.hidden_slots
    own = TILES + call.up.tiles + group
    pl.when(i < slots)(lambda: block.wait(own, block.pieces[0] * block.tiles.warpgroups))
    pl.when(i == slots)(lambda: block.wait(HIDDEN, call.grid))


def _take_early(block: Block, first, end) -> None:
    """Fills ring slots first:end with marked hidden values as soon as they arrive."""
    take = marks.take(block.call.dtype, block.tiles.batch)

    @pl.loop(first, end)
    def _(i):
        _, group = block.tile_chunk(block.call.down, block.down[0] + i)
        block.refs["h_ring"].at[i, 0][...] = take(block.refs["early"], group)
        plgpu.commit_smem()
        plgpu.barrier_arrive(block.refs["h_full"].at[i])
