"""The consumers: the warpgroups that multiply."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC

from pallas_kernels.sparse_mlp.mosaic import gather, marks, partials
from pallas_kernels.sparse_mlp.mosaic.biases import Biases
from pallas_kernels.sparse_mlp.mosaic.block import RESULT, TILES, Block


def consume(block: Block, warpgroup) -> None:
    """Multiplies; `warpgroup` owns 64 rows of each up-projection stage and a share of the down-projection's columns."""
    tiles = block.tiles
    announces = tiles.fused and not tiles.marked
    plgpu.set_max_registers(block.registers.consumer, action="increase")
    biases = Biases(block, warpgroup)
    if "x" in block.refs:
        up_part = functools.partial(_up_part, block, warpgroup, biases)
        block.for_each_part(block.call.up, block.up, up_part)
        if announces:  # the last tile; the loader announces the others
            last = lax.div(block.up[1] - 1, jnp.int32(block.call.up.chunks))
            pl.when(block.up[1] > block.up[0])(lambda: block.arrive(TILES + last))
    block.await_marks()
    if "w_down" in block.refs:
        down_part = functools.partial(_down_part, block, warpgroup)
        block.for_each_part(block.call.down, block.down, down_part)
    if announces:
        block.arrive(RESULT)
    block.finish(warpgroup)


def _up_part(block: Block, warpgroup, biases: Biases, number, tile, start, end) -> None:
    call, tiles, refs = block.call, block.tiles, block.refs
    pieces = tiles.cols // tiles.x_cols
    own = number - block.number * call.up.max_parts
    bias = biases.of(own)
    rows = pl.ds(warpgroup * 64, 64)
    depth = min(tiles.x_cols, 128 if tiles.groups * tiles.batch <= 128 else 64)

    def unit(u, multiply):
        slots = [lax.rem((u - block.up[0]) * pieces + p, jnp.int32(tiles.x_slots)) for p in range(pieces)]
        for g in range(tiles.groups):
            t = (u - block.up[0]) * tiles.groups + g
            _await_full(block, t)
            for p, slot in enumerate(slots):
                if g == 0:
                    plgpu.barrier_wait(refs["x_full"].at[slot])
                for c in range(0, tiles.x_cols, depth):
                    a = refs["w_ring"].at[block.slot(t), rows, pl.ds(p * tiles.x_cols + c, depth)]
                    multiply(g, a, refs["x_ring"].at[slot, :, pl.ds(c, depth)].T)
                if g == tiles.groups - 1 and p > 0:
                    _release_input(block, slots[p - 1], tiles.x_cols // depth)
            _release(block, t)
        plgpu.barrier_arrive(refs["x_empty"].at[slots[-1]])

    total = _accumulate(block, tiles.groups, start, end, unit)
    begins = lax.rem(start, jnp.int32(call.up.chunks)) == 0
    if tiles.marked:
        pl.when(own == 0)(lambda: plgpu.barrier_wait(refs["marked"].at[0]))
    for g in range(tiles.groups):
        part = total[g * 64 : (g + 1) * 64]
        if bias is not None:
            part = part + bias(g) * begins.astype(jnp.float32)
        place = g * tiles.warpgroups + warpgroup
        if tiles.marked:
            first = number * tiles.groups * tiles.warpgroups
            marks.store("float32")(part, refs["up_parts"], (first + place) * (tiles.batch // 8))
        else:
            refs["up_parts"][number, place] = part


def _down_part(block: Block, warpgroup, number, tile, start, end) -> None:
    call, tiles, refs = block.call, block.tiles, block.refs
    share = tiles.cols // tiles.warpgroups

    def unit(v, multiply):
        t = block.up_stages + v - block.down[0]
        _await_full(block, t)
        slot = lax.rem(v - block.down[0], jnp.int32(tiles.hidden_slots))
        plgpu.barrier_wait(refs["h_full"].at[slot])
        for r in range(tiles.warpgroups):
            for p in range(share // 64):
                columns = pl.ds(warpgroup * share + p * 64, 64)
                a = refs["w_ring"].at[block.slot(t), pl.ds(r * 64, 64), columns]
                multiply(p, a.T, refs["h_ring"].at[slot, r])
        _release(block, t)
        plgpu.barrier_arrive(refs["h_empty"].at[slot])

    total = _accumulate(block, share // 64, start, end, unit)
    store = marks.store(call.kind) if tiles.marked else partials.store(call.kind)
    for p in range(share // 64):
        place = warpgroup * (share // 64) + p
        part = total[p * 64 : (p + 1) * 64]
        if tiles.fused:
            store(part, refs["down_parts"], (number * (tiles.cols // 64) + place) * call.result_fours)
        elif block.interpret:
            refs["down_parts"].at[number, place][...] = part.T
        else:
            partials.store_transposed(part, refs["down_parts"].at[number, place])


def _await_full(block: Block, t) -> None:
    if block.tiles.copy == "rows":
        plgpu.barrier_wait(block.refs["full"].at[block.slot(t)])
    else:
        parity = lax.rem(lax.div(t, jnp.int32(block.tiles.stages)), jnp.int32(2))
        gather.wait(block.refs["full"], block.slot(t), parity)


def _release(block: Block, t) -> None:
    """Frees a weight slot once all products have read it."""
    _await_products(block, 0)  # the copies that overwrite it need no fence: it was only read
    plgpu.barrier_arrive(block.refs["empty"].at[block.slot(t)])


def _release_input(block: Block, slot, pending: int) -> None:
    """Frees an input slot once all products but the last `pending` have finished."""
    _await_products(block, pending)
    plgpu.barrier_arrive(block.refs["x_empty"].at[slot])


def _await_products(block: Block, pending: int) -> None:
    """Waits until all products but the last `pending` have finished."""
    if block.interpret:
        plgpu.commit_smem()  # the interpreter loads wgmma's operands itself
    else:
        plgpu.wgmma_wait(pending)


def _accumulate(block: Block, pieces: int, start, end, unit) -> jax.Array:
    """float32 [64 pieces, batch]: `unit(u, multiply)` over all units; multiply(i, a, b) adds a · b to rows 64 i on."""
    shape = (64 * pieces, block.tiles.batch)
    if block.interpret:  # the interpreter's wgmma takes no operand from registers
        return lax.fori_loop(start, end, _interpreted(unit, pieces, shape), jnp.zeros(shape, jnp.float32))

    def run(acc):
        def multiply(i, a, b):
            target = acc if pieces == 1 else acc.at[pl.ds(i * 64, 64)]
            plgpu.wgmma(target, plgpu.load(a, layout=plgpu.Layout.WGMMA), b)

        pl.loop(start, end)(lambda u: unit(u, multiply))
        return acc[...]

    return pl.run_scoped(run, ACC(shape, jnp.float32))


def _interpreted(unit, pieces: int, shape: tuple[int, int]):
    def step(u, total):
        sums = [jnp.zeros((64, shape[1]), jnp.float32)] * pieces

        def multiply(i, a, b):
            a, b = plgpu.load(a).astype(jnp.float32), plgpu.load(b).astype(jnp.float32)
            sums[i] = sums[i] + jnp.dot(a, b)

        unit(u, multiply)
        return total + jnp.concatenate(sums)

    return step
