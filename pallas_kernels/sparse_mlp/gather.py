"""Row gather from device memory into shared memory, in inline PTX: what Pallas has no primitive for.

Pallas's own copy arrives on a barrier with every thread once per row. Here a stage of rows costs one arrival a
warp, and a `cp.async.bulk` per row, each issued by one lane. Rows of absent neurons are filled with zeros and
nothing is read for them. Not interpretable.

Barriers here are raw `mbarrier` words in an int64 array, as inline code can't be handed a Pallas `Barrier`.
"""

import functools
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, nvvm, scf, vector

from pallas_kernels._inline import REF as _REF
from pallas_kernels._inline import SPLAT as _SPLAT
from pallas_kernels._inline import asm as _asm
from pallas_kernels._inline import constant as _c
from pallas_kernels._inline import i32 as _i32
from pallas_kernels._inline import i64 as _i64
from pallas_kernels._inline import inline as _inline
from pallas_kernels._inline import thread as _thread
from pallas_kernels._inline import utils as _utils
from pallas_kernels.sparse_mlp.schedule import Split
from pallas_kernels.sparse_mlp.tiles import PADDING

ARRIVALS = 4  # on the barrier of a stage: one a warp
IDS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)


def _index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)


def _less(a: ir.Value, b: ir.Value) -> ir.Value:
    """Unsigned, so that a negative `a` is not less."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def _place(rows: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(first row of the warp, lane, whether the lane has a row): a warp serves a quarter of the rows."""
    lane = arith.remui(_thread(), _c(32))
    first = arith.muli(arith.divui(_thread(), _c(32)), _c(rows // 4))
    return first, lane, _less(lane, _c(rows // 4))


def _neuron(index: ir.Value, entry: ir.Value, valid: ir.Value, num_neurons: int) -> ir.Value:
    """index[entry], or -1 where the entry isn't `valid`, lies beyond the end or names no neuron."""
    (k,) = ir.MemRefType(index.type).shape
    valid = arith.andi(valid, _less(entry, _c(k)))
    neuron = memref.load(index, [_index(arith.select(valid, entry, _c(0)))])
    valid = arith.andi(valid, _less(neuron, _c(num_neurons)))
    return arith.select(valid, neuron, _c(-1))


def init_barriers(count: int) -> Callable:
    """-> f(barriers int64 [count] in SMEM): initialises them. Every thread of the block must call it."""

    @_inline(arg_types=(_REF,))
    def run(ctx, barriers):
        base = _utils.memref_ptr(barriers)
        first = _utils.single_thread_predicate(scope=_utils.ThreadSubset.BLOCK)
        for i in range(count):
            nvvm.mbarrier_init(_utils.getelementptr(base, [i], _i64()), _c(ARRIVALS), predicate=first)
        _asm("fence.mbarrier_init.release.cluster;", [], "")
        gpu.barrier()

    return run


def _barrier_pointer(barriers: ir.Value, slot: mgpu.FragmentedArray) -> ir.Value:
    return _utils.getelementptr(_utils.memref_ptr(barriers), [slot.registers.item()], _i64())


@_inline(arg_types=(_REF, _SPLAT, _SPLAT))
def wait(ctx, barriers, slot, parity):
    """Blocks until the phase of that parity of barrier `slot` has completed."""
    nvvm.mbarrier_try_wait_parity(_barrier_pointer(barriers, slot), parity.registers.item(), _c(10_000_000))


@_inline()
def sync_warpgroup(ctx):
    """Barrier among the 128 threads of the calling warpgroup, ordering their memory accesses."""
    _utils.warpgroup_barrier()


@_inline(arg_types=(plgpu.Layout.WGMMA, _REF))
def store_transposed(ctx, value, out):
    """out[n, m] = value[m, n], both in whole 32-byte sectors."""
    value.foreach(lambda element, at: memref.store(element, out, [at[1], at[0]]))


def load_ids(rows: int, num_neurons: int) -> Callable:
    """-> f(index [k], base) -> int32 [128]: the neuron of each thread's row, -1 where absent."""

    @_inline(arg_types=(_REF, _SPLAT), return_type=plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=IDS))
    def run(ctx, index, base):
        first, lane, has_row = _place(rows)
        entry = arith.addi(base.registers.item(), arith.addi(first, lane))
        neuron = _neuron(index, entry, has_row, num_neurons)
        registers = np.empty((1,), dtype=object)
        registers[0] = vector.broadcast(ir.VectorType.get((1,), _i32()), neuron)
        return mgpu.FragmentedArray(_registers=registers, _layout=IDS.to_mgpu(), _is_signed=True)

    return run


def load_bias(count: int, row_tiles: int, groups: int, rows: int, num_neurons: int) -> Callable:
    """-> f(matrices) -> f(index [k], out float32 [count, 64 groups], first, row, *biases [F]): biases of some tiles.

    Tile t is the (t % row_tiles)-th of matrix t // row_tiles and has entries of the index in `groups` stages of
    `rows`; 64 of each are taken, from `row` on, zero where absent. `matrices`: whose the biases are. All reads are on
    their way at once. Ends in a barrier of the warpgroup.
    """
    total = count * 64 * groups

    def loads(matrices: tuple[int, ...]) -> Callable:
        @_inline(arg_types=(_REF, _REF, _SPLAT, _SPLAT, *(_REF for _ in matrices)))
        def run(ctx, index, out, first, row, *biases):
            f32 = ir.F32Type.get()
            first, row = first.registers.item(), row.registers.item()
            found = []
            for start in range(0, total, 128):
                i = arith.addi(_thread(), _c(start))
                part, at = arith.divui(i, _c(64 * groups)), arith.remui(i, _c(64 * groups))
                tile = arith.addi(first, part)
                stage = arith.addi(
                    arith.muli(arith.remui(tile, _c(row_tiles)), _c(groups)), arith.divui(at, _c(64))
                )
                entry = arith.addi(arith.muli(stage, _c(rows)), arith.addi(row, arith.remui(at, _c(64))))
                inside = _less(i, _c(total))
                found.append((inside, part, at, tile, _neuron(index, entry, inside, num_neurons)))
            values = []
            for _, _, _, tile, neuron in found:
                value = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
                for matrix, bias in zip(matrices, biases, strict=True):
                    mine = arith.cmpi(arith.CmpIPredicate.eq, arith.divui(tile, _c(row_tiles)), _c(matrix))
                    present = arith.andi(mine, _less(neuron, _c(num_neurons)))
                    loaded = memref.load(bias, [_index(arith.select(present, neuron, _c(0)))])
                    loaded = loaded if loaded.type == f32 else arith.extf(f32, loaded)
                    value = arith.select(present, loaded, value)
                values.append(value)
            for (inside, part, at, _, _), value in zip(found, values, strict=True):
                with _utils.when(inside):
                    memref.store(value, out, [_index(part), _index(at)])
            _utils.warpgroup_barrier()

        return run

    return loads


def _words(pairs: Iterable[ir.Value], packed: bool) -> list[ir.Value]:
    """Pairs of float32 as 32-bit words: one a number, or one a pair of bfloat16."""
    words = []
    for pair in pairs:
        low, high = (
            vector.extract(pair, dynamic_position=[], static_position=[element]) for element in (0, 1)
        )
        if packed:
            words.append(_pack(low, high, ir.BF16Type.get()))
        else:
            words += [arith.bitcast(_i32(), low), arith.bitcast(_i32(), high)]
    return words


def _numbers(word: ir.Value, packed: bool) -> list[ir.Value]:
    """The float32 in a word."""
    halves = [arith.shli(word, _c(16)), arith.andi(word, _c(-65536))] if packed else [word]
    return [arith.bitcast(ir.F32Type.get(), half) for half in halves]


def _pack(low: ir.Value, high: ir.Value, dtype: ir.Type) -> ir.Value:
    """Two float32 rounded to bfloat16 or float16, in a word."""
    short = "bf16" if dtype == ir.BF16Type.get() else "f16"
    return _asm(f"cvt.rn.{short}x2.f32 $0, $1, $2;", [high, low], "=r,f,f", _i32())


def store_fragments(packed: bool) -> Callable:
    """-> f(value float32 [64 batch], parts [n cols/64 batch 64], block): to parts as [n · cols/64, ...][block].

    In the order in which threads hold it: each 16 bytes, one thread after the other. `packed`: as bfloat16.
    """

    @_inline(arg_types=(plgpu.Layout.WGMMA, _REF, _SPLAT))
    def run(ctx, value, parts, block):
        pairs, taken = list(value.registers.flat), 4 if packed else 2
        first = arith.muli(block.registers.item(), _c(128 * len(pairs) // taken))
        first = arith.muli(arith.addi(first, _thread()), _c(4))
        target = _utils.getelementptr(_utils.memref_ptr(parts), [first], _i32())
        for i in range(0, len(pairs), taken):
            words = _words(pairs[i : i + taken], packed)
            store = f"st.global.v4.b32 [$0 + {i // taken * 128 * 16}], {{$1, $2, $3, $4}};"
            _asm(store, [target, *words], "l,r,r,r,r")

    return run


type Places = list[tuple[ir.Value, ir.Value]]  # (whether there is something, its address)


def sum_fragments(
    split: Split,
    cols: int,
    packed: bool,
    ahead: int,
    take: Callable[[Places], list[list[ir.Value]]] | None = None,
) -> Callable:
    """-> f(parts [n cols/64 batch 64], out [B D], first, step, end): the partial sums of each tile, added in order.

    `parts` is what `store_fragments` stored. Of all groups of four words a thread, tile after tile, those numbered
    first, first + step, ... below `end` are added, `ahead` of them at once.

    take: loads four words from each of some places, zeros where there is nothing.
    """
    most = split.contributions.shape[1]

    @_inline(arg_types=(_REF, _REF, _SPLAT, _SPLAT, _SPLAT))
    def run(ctx, parts, out, first, step, end):
        (_, _, batch, _) = ir.MemRefType(parts.type).shape
        quads = batch // (16 if packed else 8)  # of words of a thread, of each 64 columns
        source = _utils.memref_ptr(parts)
        first, step, end = (value.registers.item() for value in (first, step, end))

        def places(item):
            column = arith.divui(item, _c(quads))
            tile, block = arith.divui(column, _c(cols // 64)), arith.remui(column, _c(cols // 64))
            quad, found = arith.remui(item, _c(quads)), []
            for number, there in _contributors(split, tile, most):
                place = arith.addi(arith.muli(number, _c(cols // 64)), block)
                place = arith.addi(arith.muli(place, _c(quads)), quad)
                place = arith.muli(arith.addi(arith.muli(place, _c(128)), _thread()), _c(4))
                there = arith.andi(there, _less(item, end))
                found.append((there, _utils.getelementptr(source, [place], _i32())))
            return found

        def load(items):
            found = (take or _load_each)([place for item in items for place in places(item)])
            return [found[i : i + most] for i in range(0, len(found), most)]

        def store(item, found):
            sums = [
                functools.reduce(arith.addf, numbers)
                for words in zip(*found, strict=True)
                for numbers in zip(*(_numbers(word, packed) for word in words), strict=True)
            ]
            column, quad = arith.divui(item, _c(quads)), arith.remui(item, _c(quads))
            with _utils.when(_less(item, end)):
                for i in range(0, len(sums), 4):
                    row = arith.addi(arith.muli(quad, _c(2 * len(sums))), _c(2 * i))
                    _store_transposed_sums(sums[i : i + 4], out, row, arith.muli(column, _c(64)))

        loop = scf.ForOp(first, end, arith.muli(step, _c(ahead)))
        with ir.InsertionPoint(loop.body):
            taken = [arith.addi(loop.induction_variable, arith.muli(step, _c(i))) for i in range(ahead)]
            for item, found in zip(taken, load(taken), strict=True):
                store(item, found)
            scf.yield_([])

    return run


def _contributors(
    split: Split, tile: ir.Value, most: int, skipped: ir.Value | None = None
) -> list[tuple[ir.Value, ir.Value]]:
    """(number of a partial sum of a tile, whether there is one), as `split.contributions`, after those `skipped`."""

    def owner(unit):
        return arith.divui(
            arith.addi(arith.muli(arith.addi(unit, _c(1)), _c(split.blocks)), _c(-1)), _c(split.units)
        )

    first = owner(arith.muli(tile, _c(split.chunks)))
    last = owner(arith.addi(arith.muli(tile, _c(split.chunks)), _c(split.chunks - 1)))
    if skipped is not None:
        first = arith.addi(first, skipped)
    found = []
    for i in range(most):
        block = arith.addi(first, _c(i))
        start = arith.divui(arith.muli(block, _c(split.units)), _c(split.blocks))
        part = arith.subi(tile, arith.divui(start, _c(split.chunks)))
        number = arith.addi(arith.muli(block, _c(split.max_parts)), part)
        found.append((number, arith.cmpi(arith.CmpIPredicate.ule, block, last)))
    return found


def _store_transposed_sums(sums: list[ir.Value], out: ir.Value, row: ir.Value, column: ir.Value) -> None:
    """A thread's four numbers of 64 columns x 8 rows, as products leave them, to out [B D] from (row, column) on."""
    out_type = ir.MemRefType(out.type)
    rows, width = out_type.shape
    lane, warp = arith.remui(_thread(), _c(32)), arith.divui(_thread(), _c(32))
    row = arith.addi(row, arith.divui(lane, _c(4)))
    column = arith.addi(
        column, arith.addi(arith.muli(warp, _c(16)), arith.muli(arith.remui(lane, _c(4)), _c(2)))
    )
    for half in (0, 1):
        word = _pack(sums[2 * half], sums[2 * half + 1], out_type.element_type)
        word = _asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [word], "=r,r", _i32())
        place = arith.addi(arith.addi(arith.muli(row, _c(width)), column), _c(8 * half))
        target = _utils.getelementptr(_utils.memref_ptr(out), [place], out_type.element_type)
        _asm("@$2 st.global.b32 [$0], $1;", [target, word, _less(row, _c(rows))], "l,r,b")


def _load_each(places: Places) -> list[list[ir.Value]]:
    return [_load_if(there, source) for there, source in places]


def _load_if(condition: ir.Value, source: ir.Value) -> list[ir.Value]:
    """Four words, zeros where `condition` is false."""
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    load = f"{zeros} @$5 ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4];"
    four = _asm(
        load, [source, condition], "=&r,=&r,=&r,=&r,l,b", ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    )
    return [llvm.extractvalue(_i32(), four, [i]) for i in range(4)]


def issue_rows(rows: int, cols: int) -> Callable:
    """-> f(w [F D], ids, out [stages rows cols+PADDING], barriers, slot, column): starts one stage of copies.

    Columns column:column+cols of the rows `ids` go to out[slot]; barrier `slot` completes when they are there.
    """

    @_inline(arg_types=(_REF, IDS, _REF, _REF, _SPLAT, _SPLAT))
    def run(ctx, w, ids, out, barriers, slot, column):
        neuron, element = _own(ids), ir.MemRefType(w.type).element_type
        slot_elements = arith.muli(slot.registers.item(), _c(rows * (cols + PADDING)))
        out = _utils.getelementptr(_utils.memref_ptr(out), [slot_elements], element)
        source = functools.partial(_address, w, column)
        _issue(rows, cols, neuron, source, out, element, _barrier_pointer(barriers, slot))

    return run


def _own(ids: mgpu.FragmentedArray) -> ir.Value:
    (neuron,) = ids.registers.flat
    return vector.extract(neuron, dynamic_position=[], static_position=[0])


def _address(w: ir.Value, column: mgpu.FragmentedArray, row: ir.Value) -> ir.Value:
    """Of w[row, column]."""
    w_type = ir.MemRefType(w.type)
    offset = arith.muli(arith.extsi(_i64(), row), _utils.c(w_type.shape[1], _i64()))
    offset = arith.addi(offset, arith.extsi(_i64(), column.registers.item()))
    return _utils.getelementptr(_utils.memref_ptr(w), [offset], w_type.element_type)


def _evict_first() -> ir.Value:
    return _asm("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", [], "=l", _i64())


def _issue(rows, cols, neuron, source, out, element, barrier) -> None:
    first, lane, has_row = _place(rows)
    present = arith.cmpi(arith.CmpIPredicate.sge, neuron, _c(0))  # lanes without a row hold -1
    mine = _utils.getelementptr(out, [arith.muli(arith.addi(first, lane), _c(cols + PADDING))], element)
    with _utils.when(arith.andi(has_row, arith.xori(present, _utils.c(1, ir.IntegerType.get_signless(1))))):
        _zero(mine, cols * 2)
        _asm("fence.proxy.async.shared::cta;", [], "")  # a later copy of this lane will overwrite it
    votes = _asm("vote.sync.ballot.b32 $0, $1, 0xffffffff;", [present], "=r,b", _i32())
    count = _asm("popc.b32 $0, $1;", [votes], "=r,r", _i32())
    _utils.warp_barrier()
    leader = arith.cmpi(arith.CmpIPredicate.eq, lane, _c(0))
    _asm(
        "@$0 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$1], $2;",
        [leader, barrier, arith.muli(count, _c(cols * 2))],
        "b,l,r",
    )
    policy = _evict_first()
    with _utils.when(present):
        _asm(
            "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            f" [$0], [$1], {cols * 2}, [$2], $3;",
            [mine, source(neuron), barrier, policy],
            "l,l,l,l",
        )


def _zero(pointer: ir.Value, num_bytes: int) -> None:
    i64 = _i64()
    loop = scf.ForOp(_utils.c(0, i64), _utils.c(num_bytes // 16, i64), _utils.c(1, i64))
    with ir.InsertionPoint(loop.body):
        place = _utils.getelementptr(pointer, [arith.muli(loop.induction_variable, _utils.c(2, i64))], i64)
        _asm("st.shared.v4.b32 [$0], {$1, $1, $1, $1};", [place, _c(0)], "l,r")
        scf.yield_([])
