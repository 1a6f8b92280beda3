"""Hidden values in a fused kernel: the loaders add up a tile's partial sums and apply the activation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._inline import sync_warpgroup
from pallas_kernels.sparse_mlp.mosaic import marks
from pallas_kernels.sparse_mlp.mosaic.block import HIDDEN, TILES, Block
from pallas_kernels.sparse_mlp.mosaic.call import Call
from pallas_kernels.sparse_mlp.xla import thresholded

ACTIVATIONS = {"relu": lambda a: jnp.maximum(a, 0.0), "silu": lambda a: a / (1.0 + jnp.exp(-a))}


def activation(call: Call) -> Callable[[jax.Array], jax.Array]:
    """float32 -> float32: the call's activation; a ReLU with a threshold keeps values that exceed it."""
    return thresholded(call.threshold) if call.threshold else ACTIVATIONS[call.activation]


def complete(block: Block) -> None:
    """Computes this block's share of the hidden values, each as soon as its partial sums are stored."""
    refs, call, marked = block.refs, block.call, block.tiles.marked
    stage = refs["h_stage"]
    pieces, width = block.pieces

    def piece_of(neurons, piece):
        column = piece * width
        values = _values(block, neurons, column, width)
        if marked:
            marks.store(call.dtype)(values, refs["early"], (neurons * pieces + piece) * (width // 16))
        plgpu.wait_smem_to_gmem(0)
        sync_warpgroup()
        stage[...] = values.astype(call.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage, refs["hidden"].at[neurons, :, pl.ds(column, width)])
        if not marked:
            block.signal(TILES + call.up.tiles + lax.div(neurons, jnp.int32(block.tiles.warpgroups)))

    block.for_each_piece(piece_of)
    if not marked:
        block.signal(HIDDEN)


def _values(block: Block, neurons, column, width: int) -> jax.Array:
    """float32 [64 width]: hidden values of the `neurons`-th block of 64 neurons, `width` columns from `column` on."""
    call, tiles = block.call, block.tiles
    per = tiles.warpgroups
    group = lax.div(neurons, jnp.int32(per))
    tile = lax.div(group, jnp.int32(tiles.groups))
    place = lax.rem(group, jnp.int32(tiles.groups)) * per + lax.rem(neurons, jnp.int32(per))
    act = activation(call)
    up = _sum(block, tile, place, column, width)
    if not call.gated:
        return act(up)
    return act(_sum(block, tile + call.row_tiles, place, column, width)) * up


def _sum(block: Block, tile, place, column, width: int) -> jax.Array:
    """float32 [64 width]: the total of all partial sums of the `place`-th 64 neurons of a tile."""
    split, parts, tiles = block.call.up, block.refs["up_parts"], block.tiles
    if tiles.marked:
        total = marks.sum_up(split, tiles.groups, tiles.batch, width, block.call.gated)
        return total(parts, jnp.int32(tile), jnp.int32(place), jnp.int32(column))
    first, last = split.owner(tile * split.chunks), split.owner((tile + 1) * split.chunks - 1)
    block.wait(TILES + tile, (last - first + 1) * tiles.warpgroups)

    def part(i):
        owner = lax.min(first + i, last)
        number = owner * split.max_parts + tile - split.first_tile(owner)
        source = parts.at[number, place, :, pl.ds(column, width)]
        return plgpu.load(source, layout=plgpu.Layout.WGMMA, optimized=False)

    total = part(0)
    for i in range(1, split.contributions.shape[1]):
        once = lax.select(first + i <= last, jnp.float32(1), jnp.float32(0))
        total = total + part(i) * once
    return total
