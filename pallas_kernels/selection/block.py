"""What a thread block does with a row, in inline PTX: load and pool, count into bins, write. Not interpretable.

Register 4·j + i of a thread holds entry `(warp · quads + j) · 128 + lane · 4 + i`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, vector

from pallas_kernels._inline import REF, SPLAT, as_index, asm, f32, i32, i64, inline, real, utils
from pallas_kernels._inline import constant as c
from pallas_kernels.selection import tiles

TOP, BOTTOM, TOTALS, FOUND = range(4)  # rows of the block's shared slots

_SCALAR = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SPLAT)


def _at(*values: ir.Value | int) -> list[ir.Value]:
    wide = [c(value) if isinstance(value, int) else value for value in values]
    return [as_index(value) for value in wide]


def _asm(text: str, args: list[ir.Value], constraints: str, result: ir.Type | None = None) -> ir.Value:
    """PTX with a result: an int32, unless another type is given."""
    return asm(text, args, constraints, i32() if result is None else result)


def _effect(text: str, args: list[ir.Value], constraints: str) -> None:
    asm(text, args, f"{constraints},~{{memory}}")


def _compare(how: str, a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(getattr(arith.CmpIPredicate, how), a, b)


def _chosen_or_zero(condition: ir.Value, value: ir.Value) -> ir.Value:
    return arith.select(condition, value, c(0))


def _elements(array: mgpu.FragmentedArray) -> list[ir.Value]:
    return [vector.extract(r, dynamic_position=[], static_position=[0]) for r in array.registers.flat]


def _lane_and_warp() -> tuple[ir.Value, ir.Value]:
    thread = utils.thread_idx()
    return arith.remui(thread, c(32)), arith.divui(thread, c(32))


def _first_entry(n: int) -> ir.Value:
    lane, warp = _lane_and_warp()
    return arith.addi(arith.muli(warp, c(128 * tiles.quads(n))), arith.muli(lane, c(4)))


def _redux(how: str, value: ir.Value) -> ir.Value:
    return _asm(f"redux.sync.{how}.s32 $0, $1, 0xffffffff;", [value], "=r,r")


def _warp_scan(value: ir.Value) -> ir.Value:
    """The sum over the lanes up to and including this one."""
    for distance in (1, 2, 4, 8, 16):
        step = f"shfl.sync.up.b32 t|p, $1, {distance}, 0, 0xffffffff; @!p mov.b32 t, 0; add.s32 $0, t, $1;"
        value = _asm(f"{{ .reg .pred p; .reg .b32 t; {step} }}", [value], "=r,r")
    return value


def _over_warps(how: str, n: int, slots: ir.Value, row: int, mask: bool = False) -> ir.Value:
    """Reduces the values that the warps left in a row of slots; with `mask`, only those of earlier warps."""
    lane, warp = _lane_and_warp()
    value = memref.load(slots, _at(row, arith.remui(lane, c(4 * tiles.warpgroups(n)))))
    return _redux(how, _chosen_or_zero(_compare("ult", lane, warp), value) if mask else value)


def _layout(n: int) -> Any:
    return plgpu.Layout.WG_STRIDED((tiles.padded(n) // tiles.warpgroups(n),), vec_size=1)


def _array(values: list[ir.Value], n: int) -> mgpu.FragmentedArray:
    registers = np.empty((len(values),), dtype=object)
    for i, value in enumerate(values):
        registers[i] = vector.broadcast(ir.VectorType.get((1,), i32()), value)
    return mgpu.FragmentedArray(_registers=registers, _layout=_layout(n).to_mgpu(), _is_signed=True)


# ---- loading


def _load_quad(pointer: ir.Value, entry: ir.Value, n: int) -> list[ir.Value]:
    """Four entries of a row of n, a multiple of 4; past its end, the last four again."""
    if n != tiles.padded(n):
        entry = arith.minui(entry, c(n - 4))
    four = _asm(
        "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
        [utils.getelementptr(pointer, [entry], f32())],
        "=f,=f,=f,=f,l",
        ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>"),
    )
    return [llvm.extractvalue(f32(), four, [i]) for i in range(4)]


def _sum_of_positive(values: list[ir.Value]) -> ir.Value:
    total = real(0.0)
    for value in values:
        total = arith.addf(total, arith.maximumf(value, real(0.0)))
    return total


def _key(value: ir.Value, signed: bool) -> ir.Value:
    """int32 in the order of the scores; -0 equals +0, and NaN equals -inf or, unless `signed`, any negative score."""
    lowest = real(float("-inf") if signed else -1.0)
    value = _asm("max.f32 $0, $1, $2;", [value, lowest], "=f,f,f", f32())
    if not signed:
        return arith.bitcast(i32(), value)
    bits = arith.bitcast(i32(), _asm("add.rn.f32 $0, $1, 0f00000000;", [value], "=f,f", f32()))
    return arith.xori(bits, arith.andi(arith.shrsi(bits, c(31)), c(0x7FFFFFFF)))


def load(members: int, n: int, *, pool: bool, signed: bool) -> Callable:
    """-> f(scores float32 [rows members n], row, bins, slots) -> (distances [share], shift).

    Distances of keys from the row's largest, unsigned and below `2 ** (shift + digit)`; past the row's end, the largest
    uint32. pool: keys are those of the sum over `members` of the positive parts. signed: scores may be negative.
    Clears the bins.
    """

    @inline(
        arg_types=(REF, SPLAT, REF, REF),
        return_type=(
            plgpu.ShapeDtypeStruct((tiles.padded(n) // tiles.warpgroups(n),), jnp.int32, layout=_layout(n)),
            _SCALAR,
        ),
    )
    def run(ctx, scores, row, bins, slots):
        _, warp = _lane_and_warp()
        entries = [arith.addi(_first_entry(n), c(128 * j)) for j in range(tiles.quads(n))]
        start = arith.muli(arith.extsi(i64(), row.registers.item()), utils.c(members * n, i64()))
        starts = [arith.addi(start, utils.c(i * n, i64())) for i in range(members)]
        pointers = [utils.getelementptr(utils.memref_ptr(scores), [at], f32()) for at in starts]
        keys = []
        for entry in entries:
            four = zip(*(_load_quad(pointer, entry, n) for pointer in pointers), strict=True)
            keys += [_key(_sum_of_positive(list(v)) if pool else v[0], signed) for v in four]
        _effect("st.shared.v2.b32 [$0], {$1, $1};", [_bin_pair(bins), c(0)], "r,r")
        top, bottom = keys[0], keys[0]
        for key in keys[1:]:
            top, bottom = arith.maxsi(top, key), arith.minsi(bottom, key)
        memref.store(_redux("max", top), slots, _at(TOP, warp))
        memref.store(_redux("min", bottom), slots, _at(BOTTOM, warp))
        gpu.barrier()
        top, bottom = _over_warps("max", n, slots, TOP), _over_warps("min", n, slots, BOTTOM)
        zeros = _asm("clz.b32 $0, $1;", [arith.subi(top, bottom)], "=r,r")
        shift = arith.maxsi(arith.subi(c(32 - tiles.digit(n)), zeros), c(0))
        distances = [arith.subi(top, key) for key in keys]
        if n != tiles.padded(n):
            inside = [_compare("ult", arith.addi(at, c(i)), c(n)) for at in entries for i in range(4)]
            distances = [arith.select(i, d, c(-1)) for i, d in zip(inside, distances, strict=True)]
        return _array(distances, n), mgpu.FragmentedArray.splat(shift, shape=(), is_signed=True)  # pyrefly: ignore[bad-argument-type]

    return run


# ---- finding the k-th


def _shared(ref: ir.Value) -> ir.Value:
    """The reference's 32-bit address in shared memory."""
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def _bin_pair(bins: ir.Value) -> ir.Value:
    return arith.addi(_shared(bins), arith.muli(utils.thread_idx(), c(8)))


def crossing(n: int) -> Callable:
    """-> f(distances, low, shift, left, bins, slots) -> (bin, left, full).

    Bin b counts the distances from `low + (b << shift)` up to where the next bin starts. Returns the bin that holds the
    `left`-th smallest of them, its rank in that bin, and whether it is the last one there. Clears the bins.
    """

    @inline(arg_types=(_layout(n), SPLAT, SPLAT, SPLAT, REF, REF), return_type=(_SCALAR,) * 3)
    def run(ctx, distances, low, shift, left, bins, slots):
        low, shift, left = (x.registers.item() for x in (low, shift, left))
        lane, warp = _lane_and_warp()
        place = "sub.u32 a, $0, $1; shr.u32 a, a, $2;"
        count = (
            f"setp.lt.u32 p, a, {2 ** tiles.digit(n)}; mad.lo.u32 a, a, 4, $3; @p red.shared.add.u32 [a], 1;"
        )
        for distance in _elements(distances):
            given = [distance, low, shift, _shared(bins)]
            _effect(f"{{ .reg .pred p; .reg .b32 a; {place} {count} }}", given, "r,r,r,r")
        gpu.barrier()
        both = _asm(
            "ld.shared.v2.b32 {$0, $1}, [$2];",
            [_bin_pair(bins)],
            "=r,=r,r,~{memory}",
            ir.Type.parse("!llvm.struct<(i32, i32)>"),
        )
        _effect("st.shared.v2.b32 [$0], {$1, $1};", [_bin_pair(bins), c(0)], "r,r")
        first, second = (llvm.extractvalue(i32(), both, [i]) for i in range(2))
        up_to = _warp_scan(arith.addi(first, second))
        with utils.when(_compare("eq", lane, c(31))):
            memref.store(up_to, slots, _at(TOTALS, warp))
        gpu.barrier()
        up_to = arith.addi(up_to, _over_warps("add", n, slots, TOTALS, mask=True))
        in_second = arith.subi(left, arith.subi(up_to, second))
        in_first = arith.addi(in_second, first)
        for i, (nth, size) in enumerate(((in_first, first), (in_second, second))):
            with utils.when(_compare("ult", arith.subi(nth, c(1)), size)):
                bin_ = arith.addi(arith.muli(utils.thread_idx(), c(2)), c(i))
                full = arith.extui(i32(), _compare("eq", nth, size))
                for slot, value in enumerate((bin_, nth, full)):
                    memref.store(value, slots, _at(FOUND, slot))
        gpu.barrier()
        found = [memref.load(slots, _at(FOUND, slot)) for slot in range(3)]
        return tuple(mgpu.FragmentedArray.splat(value, shape=(), is_signed=True) for value in found)

    return run


# ---- writing

_COUNT = (
    "{ .reg .pred p, q; .reg .b32 t; setp.lt.u32 p, $1, $2; setp.eq.u32 q, $1, $2;"
    " selp.b32 t, 65536, 0, q; selp.b32 t, 1, t, p; add.u32 $0, $3, t; }"
)


def write(n: int, k: int) -> Callable:
    """-> f(distances, cut, extra, slots, out int32 [rows k], row): writes the chosen entries to out[row], ascending.

    The chosen entries are those with distances below `cut` and the first `extra` of those equal to it, k in all.
    """

    @inline(arg_types=(_layout(n), SPLAT, SPLAT, REF, REF, SPLAT))
    def run(ctx, distances, cut, extra, slots, out, row):
        cut, extra = cut.registers.item(), extra.registers.item()
        elements, (_, warp) = _elements(distances), _lane_and_warp()
        # Sums over the warp's earlier entries: 1 for each distance below the cut, 65,536 for each equal to it.
        before, sums = [], c(0)
        for j in range(0, len(elements), 4):
            mine = c(0)
            for distance in elements[j : j + 4]:
                mine = _asm(
                    _COUNT, [distance, cut, mine], "=r,r,r,r"
                )  # opaque, so that predicates don't fill registers
            up_to = _warp_scan(mine)
            before.append(arith.addi(sums, arith.subi(up_to, mine)))
            sums = arith.addi(sums, _asm("shfl.sync.idx.b32 $0, $1, 31, 31, 0xffffffff;", [up_to], "=r,r"))
        memref.store(sums, slots, _at(TOTALS, warp))
        gpu.barrier()
        base = _over_warps("add", n, slots, TOTALS, mask=True)
        start = arith.muli(arith.extsi(i64(), row.registers.item()), utils.c(k, i64()))
        pointer = utils.getelementptr(utils.memref_ptr(out), [start], i32())
        for j, earlier in enumerate(before):
            sums = arith.addi(earlier, base)
            equals = arith.shrui(sums, c(16))
            target = arith.addi(arith.andi(sums, c(0xFFFF)), arith.minui(equals, extra))
            for i, distance in enumerate(elements[4 * j : 4 * j + 4]):
                equal = _compare("eq", distance, cut)
                tied = arith.andi(equal, _compare("ult", equals, extra))
                chosen = arith.ori(_compare("ult", distance, cut), tied)
                entry = arith.addi(_first_entry(n), c(128 * j + i))
                at = utils.getelementptr(pointer, [target], i32())
                _effect("@$0 st.global.b32 [$1], $2;", [chosen, at, entry], "b,l,r")
                target = arith.addi(target, arith.extui(i32(), chosen))
                equals = arith.addi(equals, arith.extui(i32(), equal))

    return run
