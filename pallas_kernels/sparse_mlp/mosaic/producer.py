"""The producer: the warpgroup that fills the weight ring."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sparse_mlp.mosaic import gather
from pallas_kernels.sparse_mlp.mosaic.block import MATRICES, Block

BULK = plgpu.OOBFillMode.PROMISE_IN_BOUNDS


def produce(block: Block) -> None:
    """Fills the ring; starts on the down-projection's weights without waiting for the up-projection to end."""
    tiles, refs = block.tiles, block.refs
    plgpu.set_max_registers(block.registers.producer, action="decrease")
    matrices = [(i, refs[name]) for i, name in enumerate(MATRICES) if name in refs]
    fill = _fill_rows if tiles.copy == "rows" else _fill_inline
    fill(block, matrices)
    first = lax.max(block.stages - tiles.stages, jnp.int32(0))
    block.await_marks()
    pl.loop(first, block.stages)(lambda t: plgpu.barrier_wait(refs["empty"].at[block.slot(t)]))
    block.finish(tiles.warpgroups, registers=16)


def _await_empty(block: Block, t) -> None:
    empty = block.refs["empty"].at[block.slot(t)]
    pl.when(t >= block.tiles.stages)(lambda: plgpu.barrier_wait(empty))


def _fill_inline(block: Block, matrices) -> None:
    """Gathers in inline PTX; loads index entries one ring ahead of the rows that they name."""
    tiles, refs = block.tiles, block.refs
    load = gather.load_ids(tiles.rows, block.call.num_neurons)
    issue = gather.issue_rows(tiles.rows, tiles.cols)

    def ids(t):
        return load(refs["index"], block.locate(t)[1])

    def stage(t, queue):
        now, *others = queue
        later = ids(t + tiles.stages)
        _await_empty(block, t)
        matrix, _, column = block.locate(t)
        for i, w in matrices:
            pl.when(matrix == i)(
                lambda w=w: issue(w, now, refs["w_ring"], refs["full"], block.slot(t), column)
            )
        return (*others, later)

    lax.fori_loop(jnp.int32(0), block.stages, stage, tuple(ids(jnp.int32(t)) for t in range(tiles.stages)))


def _fill_rows(block: Block, matrices) -> None:
    refs, rows, cols = block.refs, block.tiles.rows, block.tiles.cols

    @pl.loop(0, block.stages)
    def _(t):
        _await_empty(block, t)
        slot = block.slot(t)
        matrix, entry, column = block.locate(t)

        @plgpu.warp_map
        def _(warp):
            @pl.loop(0, rows // 4)
            def _(j):
                row = j * 4 + warp
                neuron = refs["index"][entry + row]
                target = refs["w_ring"].at[slot, row, pl.ds(0, cols)]

                def copy(source):
                    plgpu.copy_gmem_to_smem(source, target, refs["full"].at[slot], oob_mode=BULK)

                for i, w in matrices:
                    pl.when((neuron >= 0) & (matrix == i))(
                        lambda w=w: copy(w.at[neuron, pl.ds(column, cols)])
                    )
                pl.when(neuron < 0)(lambda: copy(refs["zeros"].at[pl.ds(0, cols)]))
