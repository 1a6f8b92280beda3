"""Partial results from one thread block of a cluster to another's shared memory, in inline PTX. Not interpretable.

Pallas's own `async_store_smem` arrives at the other block's barrier with every thread; here the receiver itself tells
its barrier beforehand how many bytes will come, and senders only send. What travels lies as its threads hold it.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels._inline import REF as _REF
from pallas_kernels._inline import SPLAT as _SPLAT
from pallas_kernels._inline import WARPGROUP, f32, i32
from pallas_kernels._inline import asm as _asm
from pallas_kernels._inline import constant as _c
from pallas_kernels._inline import inline as _inline
from pallas_kernels._inline import thread as _thread
from pallas_kernels._inline import utils as _utils

ROWS = plgpu.Layout.WGMMA
PER_HEAD = ROWS.reduce(0)
BARRIER = 2  # int32 words of a barrier
STORE = "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32"


def expect(sent: int) -> Callable:
    """-> f(barrier): makes it complete when `sent` bytes have come. All threads of the cluster's blocks call it."""

    @_inline(arg_types=(_REF,))
    def run(ctx, barrier):
        pointer = _utils.memref_ptr(barrier)
        first = _utils.single_thread_predicate(scope=_utils.ThreadSubset.BLOCK)
        with _utils.when(first):
            nvvm.mbarrier_init(pointer, _c(1))
            _asm(
                "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", [_address(pointer), _c(sent)], "r,r"
            )
            _asm("fence.mbarrier_init.release.cluster;", [], "")
        _asm("barrier.cluster.arrive.release.aligned;", [], "")

    return run


@_inline()
def join(ctx):
    """Waits until all threads of the cluster have called what `expect` gave."""
    _asm("barrier.cluster.wait.acquire.aligned;", [], "")


@_inline(arg_types=(_REF,))
def wait(ctx, barrier):
    """Blocks until all has come."""
    pointer = _utils.memref_ptr(barrier)
    nvvm.mbarrier_try_wait_parity(pointer, _c(0), _c(10_000_000))


def send(pieces: int) -> Callable:
    """-> f(*pieces [64, heads], [heads], parts, barrier, sender): to the cluster's first thread block."""

    @_inline(arg_types=(*[ROWS] * pieces, PER_HEAD, _REF, _REF, _SPLAT))
    def run(ctx, *args):
        *arrays, parts, barrier, sender = args
        registers = [register for array in arrays for register in array.registers.flat]
        base, signal = (_address(_utils.memref_ptr(ref)) for ref in (parts, barrier))
        base, signal = (_in_first(address) for address in (base, signal))
        first = arith.muli(sender.registers.item(), _c(len(registers) * WARPGROUP * 8))
        base = arith.addi(base, arith.addi(first, arith.muli(_thread(), _c(8))))
        for i, register in enumerate(registers):
            numbers = [_element(register, j) for j in range(2)]
            _asm(
                f"{STORE} [$0+{i * WARPGROUP * 8}], {{$1, $2}}, [$3];",
                [base, *numbers, signal],
                "r,f,f,r",
            )

    return run


def receive(sender: int, pieces: int, heads: int, piece: int) -> Callable:
    """-> f(parts) -> one of the arrays of a sender: [64, heads], or [heads] for the last."""
    shape, layout = ((heads,), PER_HEAD) if piece == pieces else ((64, heads), ROWS)
    first = (sender * (2 * pieces + 1) + 2 * piece) * WARPGROUP * heads // 4
    result: Any = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    @_inline(arg_types=(_REF,), return_type=result)
    def run(ctx, parts):
        pair = ir.VectorType.get((2,), f32())
        layout_here = layout.to_mgpu()
        registers = np.empty(layout_here.registers_shape(shape), dtype=object)
        base = _utils.memref_ptr(parts)
        for i, place in enumerate(np.ndindex(registers.shape)):  # volatile: never before the wait
            at = arith.addi(arith.muli(_thread(), _c(2)), _c(first + i * WARPGROUP * 2))
            registers[place] = llvm.load(pair, _utils.getelementptr(base, [at], f32()), volatile_=True)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout_here, _is_signed=None)

    return run


def _element(register: ir.Value, i: int) -> ir.Value:
    return llvm.extractelement(register, _c(i))


def _address(pointer: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i32(), pointer)


def _in_first(address: ir.Value) -> ir.Value:
    """The same place in the shared memory of the cluster's first thread block."""
    return _asm("mapa.shared::cluster.u32 $0, $1, $2;", [address, _c(0)], "=r,r,r", i32())
