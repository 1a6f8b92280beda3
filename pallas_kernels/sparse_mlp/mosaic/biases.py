"""Biases of the up-projection: loaded to shared memory when a block starts, then added to the sums of its tiles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels._inline import (
    REF,
    SPLAT,
    as_index,
    f32,
    inline,
    less,
    real,
    sync_warpgroup,
    thread,
    utils,
)
from pallas_kernels._inline import constant as c
from pallas_kernels.sparse_mlp.mosaic import gather
from pallas_kernels.sparse_mlp.mosaic.block import Block
from pallas_kernels.sparse_mlp.mosaic.call import Call

ROW = plgpu.Layout.WGMMA.reduce(1)


class Biases:
    """The biases of one consumer's rows. Those of the block's first tiles are loaded before any weights arrive."""

    def __init__(self, block: Block, warpgroup):
        self._block, self._warpgroup = block, warpgroup
        named = enumerate(block.refs.get(name) for name in ("b_up", "b_gate"))
        self._sources: list[tuple[int, Any]] = [(i, ref) for i, ref in named if ref is not None]
        if self._sources:
            self._out = block.refs["bias"].at[warpgroup]
            self._bring(self._out, self._tile(0), block.call.bias_parts)

    def _tile(self, part):
        """The `part`-th up-projection tile of this block."""
        return lax.div(self._block.up[0], jnp.int32(self._block.call.up.chunks)) + part

    def of(self, part) -> Callable[[int], jax.Array] | None:
        """-> f(g): float32 [64 batch], the biases of group g of the block's `part`-th tile. None without biases."""
        call = self._block.call
        if not self._sources:
            return None
        last = call.bias_parts - 1
        if call.up.max_parts > call.bias_parts:

            @pl.when(part > last)
            def _():
                if not self._block.interpret:
                    sync_warpgroup()  # the previous tile may have used the same slot
                self._bring(self._out.at[pl.ds(last, 1)], self._tile(part), 1)

        def broadcast(g):
            row = plgpu.load(self._out.at[lax.min(part, jnp.int32(last)), pl.ds(g * 64, 64)], layout=ROW)
            return lax.broadcast_in_dim(row, (64, call.tiles.batch), [0])

        return broadcast

    def _bring(self, out, first, count: int) -> None:
        """Loads the biases of `count` tiles into out [count, 64 groups]."""
        if self._block.interpret:
            self._bring_interpreted(out, first, count)
            return
        matrices, sources = zip(*self._sources, strict=True)
        take = _load(self._block.call, count, matrices)
        take(self._block.refs["index"], out, first, self._warpgroup * 64, *sources)

    def _bring_interpreted(self, out, first, count: int) -> None:
        block, tiles, call = self._block, self._block.tiles, self._block.call

        @pl.loop(0, count * 64 * tiles.groups)
        def _(i):
            part, row = lax.div(i, jnp.int32(64 * tiles.groups)), lax.rem(i, jnp.int32(64 * tiles.groups))
            tile = first + part
            at = block.first_entry(tile) + lax.div(row, jnp.int32(64)) * tiles.rows
            neuron = block.refs["index"][at + self._warpgroup * 64 + lax.rem(row, jnp.int32(64))]
            for matrix, source in self._sources:
                value = source[lax.max(neuron, jnp.int32(0))].astype(jnp.float32)

                @pl.when(lax.div(tile, jnp.int32(call.row_tiles)) == matrix)
                def _(value=value):
                    out[part, row] = jnp.where(neuron >= 0, value, 0.0)


def _load(call: Call, count: int, matrices: tuple[int, ...]) -> Callable:
    """-> f(index [k], out float32 [count, 64 groups], first, row, *biases [F]): loads the biases of `count` tiles.

    For each stage of a tile it loads 64 biases, those of the index entries from `row` on; absent entries get 0.
    `matrices` says which matrix each of `biases` belongs to. All loads are in flight at once; ends in a barrier of the
    warpgroup.
    """
    row_tiles, groups, rows, num_neurons = (
        call.row_tiles,
        call.tiles.groups,
        call.tiles.rows,
        call.num_neurons,
    )
    total = count * 64 * groups

    @inline(arg_types=(REF, REF, SPLAT, SPLAT, *(REF for _ in matrices)))
    def run(ctx, index, out, first, row, *biases):
        first, row = first.registers.item(), row.registers.item()
        found = []
        for start in range(0, total, 128):
            i = arith.addi(thread(), c(start))
            part, at = arith.divui(i, c(64 * groups)), arith.remui(i, c(64 * groups))
            tile = arith.addi(first, part)
            stage = arith.addi(arith.muli(arith.remui(tile, c(row_tiles)), c(groups)), arith.divui(at, c(64)))
            entry = arith.addi(arith.muli(stage, c(rows)), arith.addi(row, arith.remui(at, c(64))))
            inside = less(i, c(total))
            found.append((inside, part, at, tile, gather.neuron_at(index, entry, inside, num_neurons)))
        values = []
        for _, _, _, tile, neuron in found:
            value = real(0.0)
            for matrix, bias in zip(matrices, biases, strict=True):
                mine = arith.cmpi(arith.CmpIPredicate.eq, arith.divui(tile, c(row_tiles)), c(matrix))
                present = arith.andi(mine, less(neuron, c(num_neurons)))
                loaded = memref.load(bias, [as_index(arith.select(present, neuron, c(0)))])
                loaded = loaded if loaded.type == f32() else arith.extf(f32(), loaded)
                value = arith.select(present, loaded, value)
            values.append(value)
        for (inside, part, at, _, _), value in zip(found, values, strict=True):
            with utils.when(inside):
                memref.store(value, out, [as_index(part), as_index(at)])
        utils.warpgroup_barrier()

    return run
