"""Counting and compaction over one thread block, in inline PTX: votes and their prefix sums. Not interpretable.

Entry `g · share + i · 128 + t` of a row lies in register i of thread t of warpgroup g.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, scf, vector

_REF = plgpu.RefType()
_SPLAT = plgpu.Layout.WG_SPLAT(())
_utils = mgpu.utils
_inline: Any = plgpu.inline_mgpu  # its results take other arguments than what it decorates


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _c(value: int) -> ir.Value:
    return _utils.c(value, _i32())


def _at(*values: ir.Value) -> list[ir.Value]:
    return [arith.index_cast(ir.IndexType.get(), value) for value in values]


def _asm(text: str, args: list[ir.Value], constraints: str) -> ir.Value:
    return llvm.inline_asm(_i32(), args, text, constraints, has_side_effects=True)


def _compare(how: str, a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(getattr(arith.CmpIPredicate, how), a, b)


def _elements(keys: mgpu.FragmentedArray) -> list[ir.Value]:
    return [vector.extract(r, dynamic_position=[], static_position=[0]) for r in keys.registers.flat]


def _lane_and_warp() -> tuple[ir.Value, ir.Value]:
    thread = _utils.thread_idx()
    return arith.remui(thread, _c(32)), arith.divui(thread, _c(32))


def _warp_sum(value: ir.Value) -> ir.Value:
    return _asm("redux.sync.add.s32 $0, $1, 0xffffffff;", [value], "=r,r")


def _vote(predicate: ir.Value) -> ir.Value:
    return _asm("vote.sync.ballot.b32 $0, $1, 0xffffffff;", [predicate], "=r,b")


def _ones(value: ir.Value) -> ir.Value:
    return _asm("popc.b32 $0, $1;", [value], "=r,r")


def counter(share: int, keys: jax.Array, counts) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """-> count(t, parity): keys of the block that are at least t. Calls in a row must alternate in parity.

    keys: this warpgroup's `share`. counts: int32 [2 32] in shared memory.
    """
    layout = plgpu.Layout.WG_STRIDED((share,), vec_size=1)

    @_inline(
        arg_types=(layout, _SPLAT, _REF, _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SPLAT),
    )
    def run(ctx, mine, candidate, slots, parity):
        lane, warp = _lane_and_warp()
        candidate, parity = candidate.registers.item(), parity.registers.item()
        reached = _c(0)
        for key in _elements(mine):
            reached = arith.addi(reached, arith.extui(_i32(), _compare("sge", key, candidate)))
        memref.store(_warp_sum(reached), slots, _at(parity, warp))
        gpu.barrier()
        total = _warp_sum(memref.load(slots, _at(parity, lane)))
        return mgpu.FragmentedArray.splat(total, shape=(), is_signed=True)

    return lambda candidate, parity: run(keys, candidate, counts, parity)


def write(share: int, k: int) -> Callable:
    """-> f(keys, threshold, extra, places, out): the chosen entries of the row, ascending, into out [k].

    Chosen are the keys above `threshold` and the first `extra` of those equal to it, k in all.
    places: int32 [entries / 32] in shared memory.
    """
    layout = plgpu.Layout.WG_STRIDED((share,), vec_size=1)

    @_inline(arg_types=(layout, _SPLAT, _SPLAT, _REF, _REF))
    def run(ctx, keys, threshold, extra, places, out):
        threshold, extra = threshold.registers.item(), extra.registers.item()
        lane, warp = _lane_and_warp()
        elements = _elements(keys)
        group, quarter = arith.divui(warp, _c(4)), arith.remui(warp, _c(4))
        first = arith.addi(arith.muli(group, _c(len(elements) * 4)), quarter)

        def place(i):  # of the votes of register i of this warp, in the order of the entries
            return _at(arith.addi(first, _c(i * 4)))

        votes = [
            (_vote(_compare("sgt", key, threshold)), _vote(_compare("eq", key, threshold)))
            for key in elements
        ]
        for i, (above, equal) in enumerate(votes):
            both = arith.addi(_ones(above), arith.shli(_ones(equal), _c(16)))
            memref.store(both, places, place(i))
        gpu.barrier()
        with _utils.when(_compare("eq", warp, _c(0))):
            _prefix_sum(places, lane)
        gpu.barrier()
        below = _asm("mov.u32 $0, %lanemask_lt;", [], "=r")
        mine = arith.shli(_c(1), lane)
        for i, (above, equal) in enumerate(votes):
            before = memref.load(places, place(i))
            above_before = arith.addi(arith.andi(before, _c(0xFFFF)), _ones(arith.andi(above, below)))
            equal_before = arith.addi(arith.shrui(before, _c(16)), _ones(arith.andi(equal, below)))
            is_above = _compare("ne", arith.andi(above, mine), _c(0))
            is_equal = _compare("ne", arith.andi(equal, mine), _c(0))
            is_equal = arith.andi(is_equal, _compare("ult", equal_before, extra))
            target = arith.addi(above_before, arith.minui(equal_before, extra))
            chosen = arith.andi(arith.ori(is_above, is_equal), _compare("ult", target, _c(k)))
            entry = arith.addi(arith.muli(group, _c(share)), _c(i * 128))
            entry = arith.addi(entry, arith.remui(_utils.thread_idx(), _c(128)))
            with _utils.when(chosen):
                memref.store(entry, out, _at(target))

    return run


def _prefix_sum(places: ir.Value, lane: ir.Value) -> None:
    """Replaces the entries by the sums of those before; one warp does it, each lane a run of entries."""
    (length,) = ir.MemRefType(places.type).shape
    run = length // 32
    first = arith.muli(lane, _c(run))

    def loop(carry, body):
        steps = scf.ForOp(_c(0), _c(run), _c(1), [carry])
        with ir.InsertionPoint(steps.body):
            at = _at(arith.addi(first, steps.induction_variable))
            scf.yield_([body(at, steps.inner_iter_args[0])])
        return steps.results[0]

    total = loop(_c(0), lambda at, sum_: arith.addi(sum_, memref.load(places, at)))
    inclusive = total
    for distance in (1, 2, 4, 8, 16):
        other = _asm(f"shfl.sync.up.b32 $0, $1, {distance}, 0, 0xffffffff;", [inclusive], "=r,r")
        far = _compare("uge", lane, _c(distance))
        inclusive = arith.addi(inclusive, arith.select(far, other, _c(0)))

    def replace(at, before):
        value = memref.load(places, at)
        memref.store(before, places, at)
        return arith.addi(before, value)

    loop(arith.subi(inclusive, total), replace)
