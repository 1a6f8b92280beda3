"""Helpers for inline PTX in Pallas kernels."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

WARPGROUP = 128  # threads

REF = plgpu.RefType()
SPLAT = plgpu.Layout.WG_SPLAT(())
utils = mgpu.utils
inline: Any = plgpu.inline_mgpu  # the function it returns takes other arguments than the one it decorates


def i32() -> ir.Type:
    """MLIR's type of 32-bit integers, signed or not."""
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    """MLIR's type of 64-bit integers, signed or not."""
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    """MLIR's type of float32."""
    return ir.F32Type.get()


def constant(value: int) -> ir.Value:
    """An int32 constant."""
    return utils.c(value, i32())


def real(value: float) -> ir.Value:
    """A float32 constant."""
    return arith.constant(f32(), ir.FloatAttr.get(f32(), value))


def thread() -> ir.Value:
    """Index of the calling thread in its warpgroup."""
    return arith.remui(utils.thread_idx(), constant(WARPGROUP))


def asm(text: str, args: list[ir.Value], constraints: str, result: ir.Type | None = None) -> ir.Value:
    """PTX with side effects; returns a value only if its type, `result`, is given."""
    result = ir.Type.parse("!llvm.void") if result is None else result
    return llvm.inline_asm(result, args, text, constraints, has_side_effects=True)  # pyrefly: ignore[bad-return]


def as_index(value: ir.Value) -> ir.Value:
    """Casts to the type that indexes references."""
    return arith.index_cast(ir.IndexType.get(), value)


def less(a: ir.Value, b: ir.Value) -> ir.Value:
    """a < b, unsigned: a negative `a` is not less."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


@inline()
def sync_warpgroup(ctx):
    """In a kernel: barrier among the 128 threads of the calling warpgroup, ordering their memory accesses."""
    utils.warpgroup_barrier()
