"""Sends partial results from one thread block of a cluster to another's shared memory, in inline PTX. Not interpretable.

With Pallas's own `async_store_smem`, every thread arrives at the other block's barrier. Here the receiver sets its
barrier beforehand to the number of bytes that will come, and senders only send. Data is laid out as threads hold it.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels._inline import REF, SPLAT, WARPGROUP, asm, f32, i32, inline, thread, utils
from pallas_kernels._inline import constant as c
from pallas_kernels.decode_attention.tiles import Problem

ROWS = plgpu.Layout.WGMMA
PER_HEAD = ROWS.reduce(0)
BARRIER = 2  # int32 words of a barrier
STORE = "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32"


def expect(sent: int) -> Callable:
    """-> f(barrier): makes it complete when `sent` bytes have arrived. All threads of the cluster must call it."""

    @inline(arg_types=(REF,))
    def run(ctx, barrier):
        pointer = utils.memref_ptr(barrier)
        first = utils.single_thread_predicate(scope=utils.ThreadSubset.BLOCK)
        with utils.when(first):
            nvvm.mbarrier_init(pointer, c(1))
            asm("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", [_address(pointer), c(sent)], "r,r")
            asm("fence.mbarrier_init.release.cluster;", [], "")
        asm("barrier.cluster.arrive.release.aligned;", [], "")

    return run


@inline()
def join(ctx):
    """Waits until all threads of the cluster have called the function that `expect` returned."""
    asm("barrier.cluster.wait.acquire.aligned;", [], "")


@inline(arg_types=(REF,))
def wait(ctx, barrier):
    """Waits until all bytes have arrived."""
    pointer = utils.memref_ptr(barrier)
    nvvm.mbarrier_try_wait_parity(pointer, c(0), c(10_000_000))


def send(problem: Problem) -> Callable:
    """-> f(*pieces [64, heads], [heads], parts, barrier, sender): sends to the cluster's first thread block."""
    pieces = len(problem.row_pieces)

    @inline(arg_types=(*[ROWS] * pieces, PER_HEAD, REF, REF, SPLAT))
    def run(ctx, *args):
        *arrays, parts, barrier, sender = args
        registers = [register for array in arrays for register in array.registers.flat]
        base, signal = (_address(utils.memref_ptr(ref)) for ref in (parts, barrier))
        base, signal = (_in_first(address) for address in (base, signal))
        first = arith.muli(sender.registers.item(), c(len(registers) * WARPGROUP * 8))
        base = arith.addi(base, arith.addi(first, arith.muli(thread(), c(8))))
        for i, register in enumerate(registers):
            numbers = [_element(register, j) for j in range(2)]
            asm(
                f"{STORE} [$0+{i * WARPGROUP * 8}], {{$1, $2}}, [$3];",
                [base, *numbers, signal],
                "r,f,f,r",
            )

    return run


def receive(problem: Problem, sender: int, piece: int) -> Callable:
    """-> f(parts) -> one of a sender's arrays: a piece [64, heads] or, after the last of these, [heads]."""
    heads, after = problem.heads, piece == len(problem.row_pieces)
    shape, layout = ((heads,), PER_HEAD) if after else ((64, heads), ROWS)
    first = sender * problem.part_words + piece * (WARPGROUP * heads // 2)
    result: Any = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    @inline(arg_types=(REF,), return_type=result)
    def run(ctx, parts):
        pair = ir.VectorType.get((2,), f32())
        layout_here = layout.to_mgpu()
        registers = np.empty(layout_here.registers_shape(shape), dtype=object)
        base = utils.memref_ptr(parts)
        for i, place in enumerate(np.ndindex(registers.shape)):  # volatile: must not move above the wait
            at = arith.addi(arith.muli(thread(), c(2)), c(first + i * WARPGROUP * 2))
            registers[place] = llvm.load(pair, utils.getelementptr(base, [at], f32()), volatile_=True)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout_here, _is_signed=None)

    return run


def _element(register: ir.Value, i: int) -> ir.Value:
    return llvm.extractelement(register, c(i))


def _address(pointer: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i32(), pointer)


def _in_first(address: ir.Value) -> ir.Value:
    """The same place in the shared memory of the cluster's first thread block."""
    return asm("mapa.shared::cluster.u32 $0, $1, $2;", [address, c(0)], "=r,r,r", i32())
