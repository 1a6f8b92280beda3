"""Gathers rows from device memory into shared memory, in inline PTX, because Pallas has no primitive for it.

With Pallas's own copy, every thread arrives on a barrier once per row. Here a stage costs one arrival per warp and one
`cp.async.bulk` per row, each issued by a single lane. Rows of absent neurons are filled with zeros, and nothing is
read for them. The interpreter cannot run this.

Barriers are raw `mbarrier` words in an int64 array, because inline code cannot take a Pallas `Barrier`.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, nvvm, scf, vector

from pallas_kernels._inline import REF, SPLAT, as_index, asm, i32, i64, inline, less, thread, utils
from pallas_kernels._inline import constant as c
from pallas_kernels.sparse_mlp.tiles import PADDING

ARRIVALS = 4  # on the barrier of a stage: one per warp
IDS = plgpu.Layout.WG_STRIDED((128,), vec_size=1)


def _place(rows: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(the warp's first row, lane, whether the lane has a row): each warp copies a quarter of the rows."""
    lane = arith.remui(thread(), c(32))
    first = arith.muli(arith.divui(thread(), c(32)), c(rows // 4))
    return first, lane, less(lane, c(rows // 4))


def neuron_at(index: ir.Value, entry: ir.Value, valid: ir.Value, num_neurons: int) -> ir.Value:
    """index[entry], or -1 if the entry is not `valid`, is past the end or names no neuron."""
    (k,) = ir.MemRefType(index.type).shape
    valid = arith.andi(valid, less(entry, c(k)))
    neuron = memref.load(index, [as_index(arith.select(valid, entry, c(0)))])
    valid = arith.andi(valid, less(neuron, c(num_neurons)))
    return arith.select(valid, neuron, c(-1))


def init_barriers(count: int) -> Callable:
    """-> f(barriers int64 [count] in SMEM): initializes them. Every thread of the block must call it."""

    @inline(arg_types=(REF,))
    def run(ctx, barriers):
        base = utils.memref_ptr(barriers)
        first = utils.single_thread_predicate(scope=utils.ThreadSubset.BLOCK)
        for i in range(count):
            nvvm.mbarrier_init(utils.getelementptr(base, [i], i64()), c(ARRIVALS), predicate=first)
        asm("fence.mbarrier_init.release.cluster;", [], "")
        gpu.barrier()

    return run


def _barrier_pointer(barriers: ir.Value, slot: mgpu.FragmentedArray) -> ir.Value:
    return utils.getelementptr(utils.memref_ptr(barriers), [slot.registers.item()], i64())


@inline(arg_types=(REF, SPLAT, SPLAT))
def wait(ctx, barriers, slot, parity):
    """Waits until barrier `slot` has completed its phase of that parity."""
    nvvm.mbarrier_try_wait_parity(_barrier_pointer(barriers, slot), parity.registers.item(), c(10_000_000))


def load_ids(rows: int, num_neurons: int) -> Callable:
    """-> f(index [k], base) -> int32 [128]: the neuron of each thread's row, -1 where absent."""

    @inline(arg_types=(REF, SPLAT), return_type=plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=IDS))
    def run(ctx, index, base):
        first, lane, has_row = _place(rows)
        entry = arith.addi(base.registers.item(), arith.addi(first, lane))
        neuron = neuron_at(index, entry, has_row, num_neurons)
        registers = np.empty((1,), dtype=object)
        registers[0] = vector.broadcast(ir.VectorType.get((1,), i32()), neuron)
        return mgpu.FragmentedArray(_registers=registers, _layout=IDS.to_mgpu(), _is_signed=True)

    return run


def issue_rows(rows: int, cols: int) -> Callable:
    """-> f(w [F D], ids, out [stages rows cols+PADDING], barriers, slot, column): starts copying one stage.

    Copies columns column:column+cols of the rows `ids` to out[slot]; barrier `slot` completes when they have arrived.
    """

    @inline(arg_types=(REF, IDS, REF, REF, SPLAT, SPLAT))
    def run(ctx, w, ids, out, barriers, slot, column):
        neuron, element = _own(ids), ir.MemRefType(w.type).element_type
        slot_elements = arith.muli(slot.registers.item(), c(rows * (cols + PADDING)))
        out = utils.getelementptr(utils.memref_ptr(out), [slot_elements], element)
        source = functools.partial(_address, w, column)
        _issue(rows, cols, neuron, source, out, element, _barrier_pointer(barriers, slot))

    return run


def _own(ids: mgpu.FragmentedArray) -> ir.Value:
    (neuron,) = ids.registers.flat
    return vector.extract(neuron, dynamic_position=[], static_position=[0])


def _address(w: ir.Value, column: mgpu.FragmentedArray, row: ir.Value) -> ir.Value:
    """The address of w[row, column]."""
    w_type = ir.MemRefType(w.type)
    offset = arith.muli(arith.extsi(i64(), row), utils.c(w_type.shape[1], i64()))
    offset = arith.addi(offset, arith.extsi(i64(), column.registers.item()))
    return utils.getelementptr(utils.memref_ptr(w), [offset], w_type.element_type)


def _evict_first() -> ir.Value:
    return asm("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", [], "=l", i64())


def _issue(rows, cols, neuron, source, out, element, barrier) -> None:
    first, lane, has_row = _place(rows)
    present = arith.cmpi(arith.CmpIPredicate.sge, neuron, c(0))  # lanes without a row hold -1
    mine = utils.getelementptr(out, [arith.muli(arith.addi(first, lane), c(cols + PADDING))], element)
    with utils.when(arith.andi(has_row, arith.xori(present, utils.c(1, ir.IntegerType.get_signless(1))))):
        _zero(mine, cols * 2)
        asm("fence.proxy.async.shared::cta;", [], "")  # a later copy of this lane will overwrite it
    votes = asm("vote.sync.ballot.b32 $0, $1, 0xffffffff;", [present], "=r,b", i32())
    count = asm("popc.b32 $0, $1;", [votes], "=r,r", i32())
    utils.warp_barrier()
    leader = arith.cmpi(arith.CmpIPredicate.eq, lane, c(0))
    asm(
        "@$0 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [$1], $2;",
        [leader, barrier, arith.muli(count, c(cols * 2))],
        "b,l,r",
    )
    policy = _evict_first()
    with utils.when(present):
        asm(
            "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            f" [$0], [$1], {cols * 2}, [$2], $3;",
            [mine, source(neuron), barrier, policy],
            "l,l,l,l",
        )


def _zero(pointer: ir.Value, num_bytes: int) -> None:
    wide = lambda value: utils.c(value, i64())
    loop = scf.ForOp(wide(0), wide(num_bytes // 16), wide(1))
    with ir.InsertionPoint(loop.body):
        place = utils.getelementptr(pointer, [arith.muli(loop.induction_variable, wide(2))], i64())
        asm("st.shared.v4.b32 [$0], {$1, $1, $1, $1};", [place, c(0)], "l,r")
        scf.yield_([])
