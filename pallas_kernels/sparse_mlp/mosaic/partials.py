"""Partial sums in device memory, stored in the order in which threads hold them: 16 bytes per thread at a time.

Inline PTX, which the interpreter cannot run. Places in these arrays are counted in fours: a four is four words from
each thread of a warpgroup. A word holds one float32 or two 16-bit values.
"""

import functools
from collections.abc import Callable

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf, vector

from pallas_kernels._inline import REF, SPLAT, asm, f32, i32, inline, less, thread, utils
from pallas_kernels._inline import constant as c
from pallas_kernels.sparse_mlp.schedule import Split

FOUR_BYTES = 128 * 16  # size of a four

type Places = list[tuple[ir.Value, ir.Value]]  # (whether a value is stored there, its address)
type Words = list[ir.Value]


def address(ref: ir.Value, place: ir.Value) -> ir.Value:
    """The address of the calling thread's words at `place`."""
    first = arith.addi(arith.muli(place, c(128)), thread())
    return utils.getelementptr(utils.memref_ptr(ref), [arith.muli(first, c(4))], i32())


def element(kind: str) -> ir.Type:
    """The MLIR type of "float32", "bfloat16" or "float16"."""
    return {"bfloat16": ir.BF16Type, "float16": ir.F16Type, "float32": ir.F32Type}[kind].get()


def pack(low: ir.Value, high: ir.Value, kind: ir.Type) -> ir.Value:
    """Two float32 values, rounded to bfloat16 or float16, in one word."""
    short = "bf16" if kind == ir.BF16Type.get() else "f16"
    return asm(f"cvt.rn.{short}x2.f32 $0, $1, $2;", [high, low], "=r,f,f", i32())


def _words(pair: ir.Value, kind: str) -> Words:
    low, high = (vector.extract(pair, dynamic_position=[], static_position=[i]) for i in (0, 1))
    if kind != "float32":
        return [pack(low, high, element(kind))]
    return [arith.bitcast(i32(), number) for number in (low, high)]


def _numbers(word: ir.Value, kind: str) -> list[ir.Value]:
    """The values in a word, as float32."""
    halves = [arith.shli(word, c(16)), arith.andi(word, c(-65536))] if kind == "bfloat16" else [word]
    return [arith.bitcast(f32(), half) for half in halves]


def store(
    kind: str, *, how: str = "st.global", change: Callable[[ir.Value], ir.Value] | None = None
) -> Callable:
    """-> f(value float32 [64 n], ref, place): stores `value` as dtype `kind`, from `place` on.

    how: the store instruction. change: applied to each word before it is stored.
    """

    @inline(arg_types=(plgpu.Layout.WGMMA, REF, SPLAT))
    def run(ctx, value, ref, place):
        words = [word for pair in value.registers.flat for word in _words(pair, kind)]
        words = words if change is None else [change(word) for word in words]
        target = address(ref, place.registers.item())
        for i in range(0, len(words), 4):
            text = f"{how}.v4.b32 [$0 + {i // 4 * FOUR_BYTES}], {{$1, $2, $3, $4}};"
            asm(text, [target, *words[i : i + 4]], "l,r,r,r,r")

    return run


@inline(arg_types=(plgpu.Layout.WGMMA, REF))
def store_transposed(ctx, value, out):
    """out[n, m] = value[m, n]; in this order, reads and writes cover whole 32-byte sectors."""
    value.foreach(lambda number, at: memref.store(number, out, [at[1], at[0]]))


def load_words(places: Places) -> list[Words]:
    """Loads four words from each place, zeros where nothing is stored."""
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    text = f"{zeros} @$5 ld.global.v4.b32 {{$0, $1, $2, $3}}, [$4];"
    return [load_four(text, [source, there], "=&r,=&r,=&r,=&r,l,b") for there, source in places]


def load_four(text: str, arguments: list[ir.Value], constraints: str) -> Words:
    """Runs inline code that loads four words, and returns them."""
    four = asm(text, arguments, constraints, ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"))
    return [llvm.extractvalue(i32(), four, [i]) for i in range(4)]


def contributors(split: Split, tile: ir.Value, most: int, skipped: ir.Value | None = None) -> Places:
    """(number, whether it exists) of up to `most` partial sums of a tile, after the first `skipped`.

    The same numbers as in `split.contributions`.
    """

    def owner(unit):
        return arith.divui(
            arith.addi(arith.muli(arith.addi(unit, c(1)), c(split.blocks)), c(-1)), c(split.units)
        )

    first = owner(arith.muli(tile, c(split.chunks)))
    last = owner(arith.addi(arith.muli(tile, c(split.chunks)), c(split.chunks - 1)))
    if skipped is not None:
        first = arith.addi(first, skipped)
    found = []
    for i in range(most):
        block = arith.addi(first, c(i))
        start = arith.divui(arith.muli(block, c(split.units)), c(split.blocks))
        part = arith.subi(tile, arith.divui(start, c(split.chunks)))
        number = arith.addi(arith.muli(block, c(split.max_parts)), part)
        found.append((number, arith.cmpi(arith.CmpIPredicate.ule, block, last)))
    return found  # pyrefly: ignore[bad-return]


def add_up(
    split: Split,
    cols: int,
    kind: str,
    ahead: int,
    take: Callable[[Places], list[Words]],
    workers: int,
    items: int,
) -> Callable:
    """-> f(parts [n cols/64 batch 64], out [B D], worker): adds up the partial sums of each tile, in order.

    `parts` was stored as dtype `kind`, with the fours of 64 columns of a partial sum next to each other. The result
    has `items` fours, tile after tile; a worker computes those numbered worker, worker + workers, ..., `ahead` at a
    time. `take` loads the words: `load_words`, or a function that waits for them first.
    """
    most = split.contributions.shape[1]

    @inline(arg_types=(REF, REF, SPLAT))
    def run(ctx, parts, out, worker):
        (_, _, batch, _) = ir.MemRefType(parts.type).shape
        quads = batch // (8 if kind == "float32" else 16)  # fours per 64 columns
        first, step, end = worker.registers.item(), c(workers), c(items)

        def places(item):
            column = arith.divui(item, c(quads))
            tile, block = arith.divui(column, c(cols // 64)), arith.remui(column, c(cols // 64))
            quad, found = arith.remui(item, c(quads)), []
            for number, there in contributors(split, tile, most):
                place = arith.addi(arith.muli(number, c(cols // 64)), block)
                place = arith.addi(arith.muli(place, c(quads)), quad)
                source = address(parts, place)
                found.append((arith.andi(there, less(item, end)), source))
            return found

        def load(items):
            found = take([place for item in items for place in places(item)])
            return [found[i : i + most] for i in range(0, len(found), most)]

        def put(item, found):
            sums = [
                functools.reduce(arith.addf, numbers)
                for words in zip(*found, strict=True)
                for numbers in zip(*(_numbers(word, kind) for word in words), strict=True)
            ]
            column, quad = arith.divui(item, c(quads)), arith.remui(item, c(quads))
            with utils.when(less(item, end)):
                for i in range(0, len(sums), 4):
                    row = arith.addi(arith.muli(quad, c(2 * len(sums))), c(2 * i))
                    _put_transposed(sums[i : i + 4], out, row, arith.muli(column, c(64)))  # pyrefly: ignore[bad-argument-type]

        loop = scf.ForOp(first, end, arith.muli(step, c(ahead)))
        with ir.InsertionPoint(loop.body):
            taken = [arith.addi(loop.induction_variable, arith.muli(step, c(i))) for i in range(ahead)]
            for item, found in zip(taken, load(taken), strict=True):
                put(item, found)
            scf.yield_([])

    return run


def _put_transposed(sums: list[ir.Value], out: ir.Value, row: ir.Value, column: ir.Value) -> None:
    """Stores a thread's four values of 64 columns by 8 rows, in wgmma's layout, to out [B D] from (row, column) on."""
    out_type = ir.MemRefType(out.type)
    rows, width = out_type.shape
    lane, warp = arith.remui(thread(), c(32)), arith.divui(thread(), c(32))
    row = arith.addi(row, arith.divui(lane, c(4)))
    column = arith.addi(
        column, arith.addi(arith.muli(warp, c(16)), arith.muli(arith.remui(lane, c(4)), c(2)))
    )
    for half in (0, 1):
        word = pack(sums[2 * half], sums[2 * half + 1], out_type.element_type)
        word = asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [word], "=r,r", i32())
        place = arith.addi(arith.addi(arith.muli(row, c(width)), column), c(8 * half))
        target = utils.getelementptr(utils.memref_ptr(out), [place], out_type.element_type)
        asm("@$2 st.global.b32 [$0], $1;", [target, word, less(row, c(rows))], "l,r,b")
