"""Selective MLP on Hopper (Pallas Mosaic GPU): two products over gathered rows, in one kernel or two.

A thread block streams stages of `rows` gathered weight rows times `cols` columns through a ring in shared memory.
One warpgroup fills the ring, one (the loader) brings the other operand, the rest multiply: weights from shared
memory to registers as wgmma's left operand, the batch as its N.
  up:   part[tile, 64 neurons, batch] += W[rows, cols] · x[cols, batch]
  down: part[tile, 64 columns, batch] += W[rows, cols]ᵀ · hidden[rows, batch]
`schedule.Split` deals the units of a product evenly to the blocks; the partial sums of a tile are added afterwards,
in a fixed order: by XLA, or by the same kernel. There, loaders turn each 64 neurons' sums into hidden values as soon as
they can; a block's first hidden values are taken one by one, the others once all blocks have completed theirs; at
last, all warpgroups add up the result.
What a fused kernel waits for is announced by semaphores; with one multiplying warpgroup, by marks (`marks.py`), and
the semaphores tell no more than that all blocks have made their marks, and have completed their hidden values.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]

from pallas_kernels.sparse_mlp import gather, marks
from pallas_kernels.sparse_mlp.plan import Plan
from pallas_kernels.sparse_mlp.tiles import HIDDEN_WIDTH

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
BULK = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
ACTIVATIONS = {"relu": lambda a: jnp.maximum(a, 0.0), "silu": lambda a: a / (1.0 + jnp.exp(-a))}
MATRICES = ("w_up", "w_gate", "w_down")
REGISTERS = {1: (232, 104, 128), 2: (192, 48, 80)}  # consumers, producer, loader; in all 512 a lane at most
HIDDEN, MARKS, TILES = range(3)  # what semaphores of a fused kernel count: see `Plan.semaphores`
RESULT = MARKS  # of kernels without marks
COMPILER = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,  # the other one can't slice padded rows
    unsafe_no_auto_barriers=True,
    approx_math=True,
)


def _int(value: int) -> jax.Array:
    return jnp.int32(value)


class Block:
    """What one thread block does; the methods are the roles of its warpgroups.

    refs: the kernel's references by name. It multiplies up if there is an "x", down if there is a "w_down".
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], interpret: bool):
        self.plan, self.tiles, self.refs, self.interpret = plan, plan.tiles, refs, interpret
        self.block = lax.axis_index("block")
        self.up = self._range(plan.up, "x")
        self.down = self._range(plan.down, "w_down")
        self.up_stages = (self.up[1] - self.up[0]) * _int(plan.tiles.groups)
        self.stages = self.up_stages + self.down[1] - self.down[0]

    def _range(self, split, needs):
        if needs not in self.refs:
            return _int(0), _int(0)
        return split.start(self.block), split.start(self.block + 1)

    # What blocks tell each other

    def _wait(self, semaphore, value):
        arrived = self.refs["arrived"].at[semaphore]
        plgpu.semaphore_wait(arrived, value, decrement=False, memory_scope="gpu")

    def _arrive(self, semaphore, count: int = 1):
        """Tells all blocks that what the calling warpgroup stored, or knows to be stored, is there."""
        gather.sync_warpgroup()
        plgpu.semaphore_signal(self.refs["arrived"].at[semaphore], count, memory_scope="gpu")

    def _signal(self, semaphore):
        """Tells all blocks that what the calling warpgroup copied to device memory is there."""
        plgpu.wait_smem_to_gmem(0)
        plgpu.semaphore_signal(self.refs["arrived"].at[semaphore], memory_scope="gpu")

    def _mark_places(self):
        """Marks what this block will store and tells its consumers, then all blocks."""
        plan, tiles, refs = self.plan, self.tiles, self.refs
        self._mark_parts(refs["up_parts"], plan.up, self.up, tiles.groups * (tiles.batch // 8))
        plgpu.barrier_arrive(refs["marked"].at[0])  # what goes down they store after all blocks' marks
        self._mark_parts(refs["down_parts"], plan.down, self.down, tiles.cols // 64 * plan.result_fours)
        pieces, width = self._pieces
        mark = marks.fill(width // 16)
        self._for_each_piece(lambda block, piece: mark(refs["early"], block * pieces + piece))
        self._arrive(MARKS)

    def _mark_parts(self, parts, split, units, fours: int):
        """Marks the places of this block's partial sums of a product, each of so many times four words a thread."""
        mark = marks.fill(fours)
        self._for_each_part(split, units, lambda number, *_: mark(parts, number))

    def _await_marks(self):
        """Until every block has marked its places."""
        if self.tiles.marked:
            self._wait(MARKS, self.plan.grid)

    # The ring of weights. Stage t lies in slot t % stages; those of the up-projection come first.

    def _slot(self, t):
        return lax.rem(t, _int(self.tiles.stages))

    def _locate(self, t):
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
        unit = self.up[0] + lax.div(t, _int(m))
        tile, chunk = self._tile_chunk(self.plan.up, unit)
        entry = self._first_entry(tile) + lax.rem(t, _int(m)) * self.tiles.rows
        return lax.div(tile, _int(self.plan.row_tiles)), entry, chunk * self.tiles.cols

    def _first_entry(self, tile):
        """First entry of the index of a tile going up."""
        return lax.rem(tile, _int(self.plan.row_tiles)) * (self.tiles.groups * self.tiles.rows)

    def _locate_down(self, t):
        tile, chunk = self._tile_chunk(self.plan.down, self.down[0] + t - self.up_stages)
        return _int(MATRICES.index("w_down")), chunk * self.tiles.rows, tile * self.tiles.cols

    def _tile_chunk(self, split, unit):
        return lax.div(unit, _int(split.chunks)), lax.rem(unit, _int(split.chunks))

    def produce(self):
        """Fills the ring, for the down-projection without waiting for the end of the up-projection."""
        plgpu.set_max_registers(REGISTERS[self.tiles.warpgroups][1], action="decrease")
        matrices = [(i, self.refs[name]) for i, name in enumerate(MATRICES) if name in self.refs]
        fill = self._fill_rows if self.tiles.copy == "rows" else self._fill_inline
        fill(matrices)
        first = lax.max(self.stages - self.tiles.stages, _int(0))
        self._await_marks()
        pl.loop(first, self.stages)(lambda t: plgpu.barrier_wait(self.refs["empty"].at[self._slot(t)]))
        self._finish(self.tiles.warpgroups, registers=16)

    def _await_empty(self, t):
        empty = self.refs["empty"].at[self._slot(t)]
        pl.when(t >= self.tiles.stages)(lambda: plgpu.barrier_wait(empty))

    def _fill_inline(self, matrices):
        rows, refs, ahead = self.tiles.rows, self.refs, self.tiles.stages
        load = gather.load_ids(rows, self.plan.num_neurons)
        issue = gather.issue_rows(rows, self.tiles.cols)

        def ids(t):
            return load(refs["index"], self._locate(t)[1])

        def stage(t, queue):
            now, *others = queue
            later = ids(t + ahead)
            self._await_empty(t)
            matrix, _, column = self._locate(t)
            for i, w in matrices:
                pl.when(matrix == i)(
                    lambda w=w: issue(w, now, refs["w_ring"], refs["full"], self._slot(t), column)
                )
            return (*others, later)

        lax.fori_loop(_int(0), self.stages, stage, tuple(ids(_int(t)) for t in range(ahead)))

    def _fill_rows(self, matrices):
        refs, rows, cols = self.refs, self.tiles.rows, self.tiles.cols

        @pl.loop(0, self.stages)
        def _(t):
            self._await_empty(t)
            slot = self._slot(t)
            matrix, entry, column = self._locate(t)

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

    def _await_full(self, t):
        if self.tiles.copy == "rows":
            plgpu.barrier_wait(self.refs["full"].at[self._slot(t)])
        else:
            parity = lax.rem(lax.div(t, _int(self.tiles.stages)), _int(2))
            gather.wait(self.refs["full"], self._slot(t), parity)

    def _release(self, t):
        """Frees a slot of weights, all of which was read."""
        if self.interpret:
            plgpu.commit_smem()  # it loads what wgmma reads
        else:
            plgpu.wgmma_wait(0)  # no fence for the copies that will overwrite it: only reads went before
        plgpu.barrier_arrive(self.refs["empty"].at[self._slot(t)])

    def _release_input(self, slot, pending: int):
        """Frees a slot of the input that all products but the last `pending` have read."""
        if self.interpret:
            plgpu.commit_smem()  # its products load what wgmma reads
        else:
            plgpu.wgmma_wait(pending)
        plgpu.barrier_arrive(self.refs["x_empty"].at[slot])

    # The loader

    def load(self):
        """Brings the input, then the hidden values; in a fused kernel it helps to compute these in between."""
        plgpu.set_max_registers(REGISTERS[self.tiles.warpgroups][2], action="decrease")
        if "x" in self.refs:
            self._load_input()
        if self.tiles.fused:
            self._complete_hidden()
        if "w_down" in self.refs:
            self._load_hidden()
        self._finish(self.tiles.warpgroups + 1)

    def _load_input(self):
        refs, tiles = self.refs, self.tiles
        pieces = tiles.cols // tiles.x_cols
        count = (self.up[1] - self.up[0]) * pieces
        first = lax.min(count, _int(tiles.x_slots))

        def wait(i):
            plgpu.barrier_wait(refs["x_empty"].at[lax.rem(i, _int(tiles.x_slots))])

        def bring(i):
            _, chunk = self._tile_chunk(self.plan.up, self.up[0] + lax.div(i, _int(pieces)))
            column = chunk * tiles.cols + lax.rem(i, _int(pieces)) * tiles.x_cols
            slot = lax.rem(i, _int(tiles.x_slots))
            source, target = refs["x"].at[:, pl.ds(column, tiles.x_cols)], refs["x_ring"].at[slot]
            plgpu.copy_gmem_to_smem(source, target, refs["x_full"].at[slot])

        def refill(i):
            wait(i)
            bring(i)
            self._announce_part(i - tiles.x_slots, pieces)

        pl.loop(0, first)(bring)
        if tiles.marked:
            self._mark_places()
        pl.loop(first, count)(refill)
        self._await_marks()

        @pl.loop(count - first, count)
        def _(i):
            wait(i)
            self._announce_part(i, pieces)

    def _announce_part(self, piece, pieces: int):
        """Once consumers have read that piece of the input: if it began a tile, the sums of the one before are stored.

        They need not wait then until all blocks can see what they stored.
        """
        if not self.tiles.fused or self.tiles.marked:
            return
        unit = self.up[0] + lax.div(piece, _int(pieces))
        tile, chunk = self._tile_chunk(self.plan.up, unit)
        begins = (lax.rem(piece, _int(pieces)) == 0) & (chunk == 0) & (unit > self.up[0])
        pl.when(begins)(lambda: self._arrive(TILES + tile - 1, self.tiles.warpgroups))

    def _await_hidden(self, i, group):
        """Before the i-th hidden values, those of `group`, are loaded: the first few one by one, the others at once."""
        plan, slots = self.plan, self.tiles.hidden_slots
        pieces, _ = self._pieces
        own = TILES + plan.up.tiles + group
        pl.when(i < slots)(lambda: self._wait(own, pieces * self.tiles.warpgroups))
        pl.when(i == slots)(lambda: self._wait(HIDDEN, plan.grid))

    def _load_hidden(self):
        refs, slots, early = self.refs, self.tiles.hidden_slots, self.tiles.marked
        count = self.down[1] - self.down[0]
        first = lax.min(count, _int(slots)) if early else _int(0)
        if early:
            once = lax.min(first, _int(1))
            self._take_hidden(_int(0), once)
            self._signal(HIDDEN)  # before more is taken: others wait for all blocks' soon
            self._take_hidden(once, first)

        def wait(i):
            plgpu.barrier_wait(refs["h_empty"].at[lax.rem(i, _int(slots))])

        @pl.loop(first, count)
        def _(i):
            pl.when(i >= slots)(lambda: wait(i))
            _, group = self._tile_chunk(self.plan.down, self.down[0] + i)
            if early:
                pl.when(i == slots)(lambda: self._wait(HIDDEN, self.plan.grid))
            elif self.tiles.fused:
                self._await_hidden(i, group)
            slot, per = lax.rem(i, _int(slots)), self.tiles.warpgroups
            source = refs["hidden"].at[pl.ds(group * per, per)]
            plgpu.copy_gmem_to_smem(source, refs["h_ring"].at[slot], refs["h_full"].at[slot])

        pl.loop(lax.max(count - slots, _int(0)), count)(wait)

    def _take_hidden(self, first, end):
        """Fills some of the first slots of the ring with hidden values as soon as they are there."""
        refs, tiles = self.refs, self.tiles
        take = marks.take(self.plan.dtype, tiles.batch)

        @pl.loop(first, end)
        def _(i):
            _, group = self._tile_chunk(self.plan.down, self.down[0] + i)
            for r in range(tiles.warpgroups):
                refs["h_ring"].at[i, r][...] = take(refs["early"], group * tiles.warpgroups + r)
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs["h_full"].at[i])

    @property
    def _pieces(self) -> tuple[int, int]:
        """(pieces in which 64 neurons' hidden values are completed, columns of each)."""
        width = min(self.tiles.batch, HIDDEN_WIDTH)
        return self.tiles.batch // width, width

    def _for_each_piece(self, body):
        """body(block of 64 neurons, piece) for this block's share of the hidden values."""
        pieces, grid = self._pieces[0], self.plan.grid
        count = self.plan.hidden[0] * pieces

        @pl.loop(0, lax.div(_int(count - 1) - self.block + _int(grid), _int(grid)))
        def _(i):
            piece = self.block + i * grid
            body(lax.div(piece, _int(pieces)), lax.rem(piece, _int(pieces)))

    def _complete_hidden(self):
        """Turns this block's share of the partial sums into hidden values, each as soon as its own are there."""
        refs, plan, stage = self.refs, self.plan, self.refs["h_stage"]
        pieces, width = self._pieces

        def complete(block, piece):
            column = piece * width
            values = self._hidden_values(block, column, width)
            if self.tiles.marked:
                marks.store(plan.dtype)(values, refs["early"], (block * pieces + piece) * (width // 16))
            plgpu.wait_smem_to_gmem(0)
            gather.sync_warpgroup()
            stage[...] = values.astype(plan.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(stage, refs["hidden"].at[block, :, pl.ds(column, width)])
            if not self.tiles.marked:
                self._signal(TILES + plan.up.tiles + lax.div(block, _int(self.tiles.warpgroups)))

        self._for_each_piece(complete)
        if not self.tiles.marked:
            self._signal(HIDDEN)

    def _hidden_values(self, block, column, width):
        """[64 width] float32: columns of a block of 64 neurons."""
        per = self.tiles.warpgroups
        group = lax.div(block, _int(per))
        tile = lax.div(group, _int(self.tiles.groups))
        place = lax.rem(group, _int(self.tiles.groups)) * per + lax.rem(block, _int(per))
        act = ACTIVATIONS[self.plan.activation]
        up = self._sum_parts(tile, place, column, width)
        if not self.plan.gated:
            return act(up)
        return act(self._sum_parts(tile + self.plan.row_tiles, place, column, width)) * up

    def _sum_parts(self, tile, place, column, width):
        split, parts, tiles = self.plan.up, self.refs["up_parts"], self.tiles
        if tiles.marked:
            total = marks.sum_up(split, tiles.groups, tiles.batch, width, self.plan.gated)
            return total(parts, _int(tile), _int(place), _int(column))
        first, last = split.owner(tile * split.chunks), split.owner((tile + 1) * split.chunks - 1)
        self._wait(TILES + tile, (last - first + 1) * tiles.warpgroups)
        total = None
        for i in range(split.contributions.shape[1]):
            owner = lax.min(first + i, last)
            number = owner * split.max_parts + tile - split.first_tile(owner)
            source = parts.at[number, place, :, pl.ds(column, width)]
            part = plgpu.load(source, layout=WGMMA, optimized=False)
            once = lax.select(first + i <= last, jnp.float32(1), jnp.float32(0))
            total = part if total is None else total + part * once
        return total

    # The consumers

    def consume(self, warpgroup):
        """Multiplies; `warpgroup` owns 64 rows of each stage going up, a share of its columns going down."""
        plgpu.set_max_registers(REGISTERS[self.tiles.warpgroups][0], action="increase")
        self._take_biases(warpgroup)
        if "x" in self.refs:
            self._for_each_part(self.plan.up, self.up, functools.partial(self._up_part, warpgroup))
            if self.tiles.fused and not self.tiles.marked:  # the loader announces all but the last
                last = lax.div(self.up[1] - 1, _int(self.plan.up.chunks))
                pl.when(self.up[1] > self.up[0])(lambda: self._arrive(TILES + last))
        self._await_marks()
        if "w_down" in self.refs:
            self._for_each_part(self.plan.down, self.down, functools.partial(self._down_part, warpgroup))
        if self.tiles.fused and not self.tiles.marked:
            self._arrive(RESULT)
        self._finish(warpgroup)

    def _finish(self, warpgroup, registers=48):
        """In a fused kernel, once partial sums of the result are there: adds up this warpgroup's share.

        registers: for sums on their way; more makes the compiler spill.
        """
        plan, tiles = self.plan, self.tiles
        if not tiles.fused:
            return
        most, workers = plan.down.contributions.shape[1], plan.grid * (tiles.warpgroups + 2)
        items = plan.d_model // 64 * plan.result_fours
        ahead = max(1, min(-(-items // workers), registers // (4 * most)))
        take = marks.await_words if tiles.marked else None
        if not tiles.marked:
            self._wait(RESULT, plan.grid * tiles.warpgroups)
        total = gather.sum_fragments(plan.down, tiles.cols, plan.packed, ahead, take)
        worker = self.block * (tiles.warpgroups + 2) + warpgroup
        total(self.refs["down_parts"], self.refs["out"], worker, _int(workers), _int(items))

    def _for_each_part(self, split, units, body):
        """body(number of the partial sum, its tile, first unit, end) for each tile that this block touches."""
        first = lax.div(units[0], _int(split.chunks))
        last = lax.div(lax.max(units[1] - 1, units[0]), _int(split.chunks))

        @pl.loop(0, lax.select(units[1] > units[0], last - first + 1, _int(0)))
        def _(part):
            tile = first + part
            start = lax.max(units[0], tile * split.chunks)
            end = lax.min(units[1], (tile + 1) * split.chunks)
            body(self.block * split.max_parts + part, tile, start, end)

    def _up_part(self, warpgroup, number, tile, start, end):
        tiles, refs = self.tiles, self.refs
        pieces = tiles.cols // tiles.x_cols
        own = number - self.block * self.plan.up.max_parts
        bias = self._bias(warpgroup, own)
        rows = pl.ds(warpgroup * 64, 64)
        depth = min(tiles.x_cols, 128 if tiles.groups * tiles.batch <= 128 else 64)

        def unit(u, multiply):
            slots = [lax.rem((u - self.up[0]) * pieces + p, _int(tiles.x_slots)) for p in range(pieces)]
            for g in range(tiles.groups):
                t = (u - self.up[0]) * tiles.groups + g
                self._await_full(t)
                for p, slot in enumerate(slots):
                    if g == 0:
                        plgpu.barrier_wait(refs["x_full"].at[slot])
                    for c in range(0, tiles.x_cols, depth):
                        a = refs["w_ring"].at[self._slot(t), rows, pl.ds(p * tiles.x_cols + c, depth)]
                        multiply(g, a, refs["x_ring"].at[slot, :, pl.ds(c, depth)].T)
                    if g == tiles.groups - 1 and p > 0:
                        self._release_input(slots[p - 1], tiles.x_cols // depth)
                self._release(t)
            plgpu.barrier_arrive(refs["x_empty"].at[slots[-1]])

        total = self._accumulate(tiles.groups, start, end, unit)
        begins = lax.rem(start, _int(self.plan.up.chunks)) == 0
        if tiles.marked:
            pl.when(own == 0)(lambda: plgpu.barrier_wait(refs["marked"].at[0]))
        for g in range(tiles.groups):
            part = total[g * 64 : (g + 1) * 64]
            if bias is not None:
                part = part + bias(g) * begins.astype(jnp.float32)
            place = g * tiles.warpgroups + warpgroup
            if tiles.marked:
                place = number * tiles.groups * tiles.warpgroups + place
                marks.store("float32")(part, refs["up_parts"], place * (tiles.batch // 8))
            else:
                refs["up_parts"][number, place] = part

    @property
    def _biases(self) -> list[tuple[int, Any]]:
        """(which of `MATRICES`, its biases)."""
        found = enumerate(self.refs.get(name) for name in ("b_up", "b_gate"))
        return [(i, ref) for i, ref in found if ref is not None]

    def _take_biases(self, warpgroup):
        """Brings the biases of this warpgroup's rows in the first tiles of this block, before any weights are there."""
        if self._biases:
            out = self.refs["bias"].at[warpgroup]
            self._take_bias(
                warpgroup, out, lax.div(self.up[0], _int(self.plan.up.chunks)), self.plan.bias_parts
            )

    def _bias(self, warpgroup, part) -> Callable | None:
        """-> f(g), the bias [64 batch] of the rows of group g of a block's tile; None without biases."""
        plan = self.plan
        if not self._biases:
            return None
        out = self.refs["bias"].at[warpgroup]
        last = plan.bias_parts - 1
        if plan.up.max_parts > plan.bias_parts:

            @pl.when(part > last)
            def _():
                if not self.interpret:
                    gather.sync_warpgroup()  # the tile before may have used the same place
                tile = lax.div(self.up[0], _int(plan.up.chunks)) + part
                self._take_bias(warpgroup, out.at[pl.ds(last, 1)], tile, 1)

        def broadcast(g):
            row = plgpu.load(out.at[lax.min(part, _int(last)), pl.ds(g * 64, 64)], layout=ROW)
            return lax.broadcast_in_dim(row, (64, self.tiles.batch), [0])

        return broadcast

    def _take_bias(self, warpgroup, out, first, count: int):
        """Brings the biases of `count` tiles to out [count, 64 groups]."""
        tiles, plan, refs = self.tiles, self.plan, self.refs
        if not self.interpret:
            take = gather.load_bias(count, plan.row_tiles, tiles.groups, tiles.rows, plan.num_neurons)
            places, sources = zip(*self._biases, strict=True)
            take(places)(refs["index"], out, first, warpgroup * 64, *sources)
            return

        @pl.loop(0, count * 64 * tiles.groups)
        def _(i):
            part, row = lax.div(i, _int(64 * tiles.groups)), lax.rem(i, _int(64 * tiles.groups))
            tile = first + part
            at = (
                self._first_entry(tile)
                + warpgroup * 64
                + lax.div(row, _int(64)) * tiles.rows
                + lax.rem(row, _int(64))
            )
            neuron = refs["index"][at]
            for matrix, source in self._biases:
                value = source[lax.max(neuron, _int(0))].astype(jnp.float32)

                @pl.when(lax.div(tile, _int(plan.row_tiles)) == matrix)
                def _(value=value):
                    out[part, row] = jnp.where(neuron >= 0, value, 0.0)

    def _down_part(self, warpgroup, number, tile, start, end):
        tiles, refs = self.tiles, self.refs
        share = tiles.cols // tiles.warpgroups

        def unit(v, multiply):
            t = self.up_stages + v - self.down[0]
            self._await_full(t)
            slot = lax.rem(v - self.down[0], _int(tiles.hidden_slots))
            plgpu.barrier_wait(refs["h_full"].at[slot])
            for r in range(tiles.warpgroups):
                for p in range(share // 64):
                    columns = pl.ds(warpgroup * share + p * 64, 64)
                    a = refs["w_ring"].at[self._slot(t), pl.ds(r * 64, 64), columns]
                    multiply(p, a.T, refs["h_ring"].at[slot, r])
            self._release(t)
            plgpu.barrier_arrive(refs["h_empty"].at[slot])

        total = self._accumulate(share // 64, start, end, unit)
        for p in range(share // 64):
            place = warpgroup * (share // 64) + p
            out = refs["down_parts"].at[number, place]
            part = total[p * 64 : (p + 1) * 64]
            if self.interpret:
                out[...] = part.T
            elif tiles.marked:
                store = marks.store("bfloat16" if self.plan.packed else "float32")
                at = (number * (tiles.cols // 64) + place) * self.plan.result_fours
                store(part, refs["down_parts"], at)
            elif tiles.fused:
                store = gather.store_fragments(self.plan.packed)
                store(part, refs["down_parts"], number * (tiles.cols // 64) + place)
            else:
                gather.store_transposed(part, out)

    def _accumulate(self, pieces, start, end, unit):
        """Sum over units of what `unit(u, multiply)` multiplies; multiply(i, a, b) adds a · b to rows 64 i."""
        shape = (64 * pieces, self.tiles.batch)
        if self.interpret:  # the interpreter's wgmma takes no operand from registers
            return lax.fori_loop(start, end, _interpreted(unit, pieces, shape), jnp.zeros(shape, jnp.float32))

        def run(acc):
            def multiply(i, a, b):
                target = acc if pieces == 1 else acc.at[pl.ds(i * 64, 64)]
                plgpu.wgmma(target, plgpu.load(a, layout=WGMMA), b)

            pl.loop(start, end)(lambda u: unit(u, multiply))
            return acc[...]

        return pl.run_scoped(run, ACC(shape, jnp.float32))


def _interpreted(unit, pieces, shape):
    def step(u, total):
        sums = [jnp.zeros((64, shape[1]), jnp.float32)] * pieces

        def multiply(i, a, b):
            a, b = plgpu.load(a).astype(jnp.float32), plgpu.load(b).astype(jnp.float32)
            sums[i] = sums[i] + jnp.dot(a, b)

        unit(u, multiply)
        return total + jnp.concatenate(sums)

    return step
