"""Row gather from device memory into shared memory, in inline PTX: what Pallas has no primitive for.

Pallas's own copy arrives on a barrier with every thread once per row. Here a stage of rows costs one arrival a
warp (`bulk`: a `cp.async.bulk` per row, each issued by one lane) or one a thread (`async`: 16 bytes a lane).
Rows of absent neurons are filled with zeros and nothing is read for them. Not interpretable.

Barriers here are raw `mbarrier` words in an int64 array, as inline code can't be handed a Pallas `Barrier`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, nvvm, scf, vector

from pallas_kernels.sparse_mlp.tiles import PADDING

ARRIVALS = {"bulk": 4, "async": 128}
IDS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

_REF = plgpu.RefType()
_SPLAT = plgpu.Layout.WG_SPLAT(())
_utils = mgpu.utils
_inline: Any = plgpu.inline_mgpu  # its results take other arguments than what it decorates


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _c(value: int) -> ir.Value:
    return _utils.c(value, _i32())


def _index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)


def _asm(text: str, args: list[ir.Value], constraints: str, result: ir.Type | None = None) -> ir.Value:
    result = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(result, args, text, constraints, has_side_effects=True)


def _less(a: ir.Value, b: ir.Value) -> ir.Value:
    """Unsigned, so that a negative `a` is not less."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def _thread() -> ir.Value:
    return arith.remui(_utils.thread_idx(), _c(128))


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


def init_barriers(count: int, copy: str) -> Callable:
    """-> f(barriers int64 [count] in SMEM): initialises them. Every thread of the block must call it."""

    @_inline(arg_types=(_REF,))
    def run(ctx, barriers):
        base = _utils.memref_ptr(barriers)
        first = _utils.single_thread_predicate(scope=_utils.ThreadSubset.BLOCK)
        for i in range(count):
            nvvm.mbarrier_init(_utils.getelementptr(base, [i], _i64()), _c(ARRIVALS[copy]), predicate=first)
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


def load_bias(rows: int, stride: int, num_neurons: int) -> Callable:
    """-> f(index [k], bias [F], out float32 [rows], base): biases of `rows` entries, zero where absent.

    Entry i of `out` is that of index[base + i // 64 * stride + i % 64]. Ends in a barrier of the warpgroup.
    """

    @_inline(arg_types=(_REF, _REF, _REF, _SPLAT))
    def run(ctx, index, bias, out, base):
        f32 = ir.F32Type.get()
        for start in range(0, rows, 128):
            i = arith.addi(_thread(), _c(start))
            inside = _less(i, _c(rows))
            offset = arith.addi(arith.muli(arith.divui(i, _c(64)), _c(stride)), arith.remui(i, _c(64)))
            neuron = _neuron(index, arith.addi(base.registers.item(), offset), inside, num_neurons)
            present = _less(neuron, _c(num_neurons))
            value = memref.load(bias, [_index(arith.select(present, neuron, _c(0)))])
            value = value if value.type == f32 else arith.extf(f32, value)
            with _utils.when(inside):
                zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
                memref.store(arith.select(present, value, zero), out, [_index(i)])
        _utils.warpgroup_barrier()

    return run


def issue_rows(rows: int, cols: int, copy: str) -> Callable:
    """-> f(w [F D], ids, out [stages rows cols+PADDING], barriers, slot, column): starts one stage of copies.

    Columns column:column+cols of the rows `ids` go to out[slot]; barrier `slot` completes when they are there.
    """
    start = {"bulk": _issue_bulk, "async": _issue_async}[copy]

    @_inline(arg_types=(_REF, IDS, _REF, _REF, _SPLAT, _SPLAT))
    def run(ctx, w, ids, out, barriers, slot, column):
        (neuron,) = ids.registers.flat
        neuron = vector.extract(neuron, dynamic_position=[], static_position=[0])
        element = ir.MemRefType(w.type).element_type
        width = ir.MemRefType(w.type).shape[1]
        slot_elements = arith.muli(slot.registers.item(), _c(rows * (cols + PADDING)))
        out = _utils.getelementptr(_utils.memref_ptr(out), [slot_elements], element)

        def source(row):  # address of w[row, column]
            offset = arith.muli(arith.extsi(_i64(), row), _utils.c(width, _i64()))
            offset = arith.addi(offset, arith.extsi(_i64(), column.registers.item()))
            return _utils.getelementptr(_utils.memref_ptr(w), [offset], element)

        start(rows, cols, neuron, source, out, element, _barrier_pointer(barriers, slot))

    return run


def _evict_first() -> ir.Value:
    return _asm("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", [], "=l", _i64())


def _issue_bulk(rows, cols, neuron, source, out, element, barrier) -> None:
    first, lane, has_row = _place(rows)
    present = arith.cmpi(arith.CmpIPredicate.sge, neuron, _c(0))  # lanes without a row hold -1
    mine = _utils.getelementptr(out, [arith.muli(arith.addi(first, lane), _c(cols + PADDING))], element)
    with _utils.when(arith.andi(has_row, arith.xori(present, _utils.c(1, ir.IntegerType.get_signless(1))))):
        _zero(mine, cols * 2)
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


def _issue_async(rows, cols, neuron, source, out, element, barrier) -> None:
    first, lane, _ = _place(rows)
    policy = _evict_first()
    for i in range(rows // 4):
        row = _asm("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", [neuron, _c(i)], "=r,r,r", _i32())
        present = arith.cmpi(arith.CmpIPredicate.sge, row, _c(0))
        size = arith.select(present, _c(16), _c(0))  # copies 0 bytes and fills with zeros
        begin = source(arith.select(present, row, _c(0)))
        target = _utils.getelementptr(
            out, [arith.muli(arith.addi(first, _c(i)), _c(cols + PADDING))], element
        )
        for c in range(0, cols, 256):
            column = arith.addi(arith.muli(lane, _c(8)), _c(c))
            args = [
                _utils.getelementptr(target, [column], element),
                _utils.getelementptr(begin, [column], element),
                size,
                policy,
            ]
            _asm("cp.async.cg.shared.global.L2::cache_hint [$0], [$1], 16, $2, $3;", args, "l,l,r,l")
    _asm("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", [barrier], "l")
