"""Numbers in device memory that tell by themselves that they are there: their place was filled with marks before.

What another thread block waits for needs then no fence and no semaphore: each word is looked at until it is no mark.
A block's loader makes its marks while the first weights are on their way. That is safe as long as (1) a word is stored
after its mark: the consumers wait for the loader's; (2) a block looks only after all blocks have announced their marks;
and (3) no number is a mark, which `_unlike_marks` and the rounding to 16 bits see to.
"""

import functools
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from pallas_kernels._inline import REF as _REF
from pallas_kernels._inline import SPLAT as _SPLAT
from pallas_kernels._inline import asm as _asm
from pallas_kernels._inline import constant as _c
from pallas_kernels._inline import i32 as _i32
from pallas_kernels._inline import inline as _inline
from pallas_kernels._inline import thread as _thread
from pallas_kernels._inline import utils as _utils
from pallas_kernels.sparse_mlp import gather
from pallas_kernels.sparse_mlp.schedule import Split

MARK = -1  # all bits set: a NaN that no conversion makes
WGMMA = plgpu.Layout.WGMMA
REGISTERS = 64  # of a thread, for partial sums on their way
PLACES = {False: 8, True: 3}  # of partial sums awaited together, by whether it is gated; more would spill


def _four(ref: ir.Value, place: ir.Value) -> ir.Value:
    """Address of the calling thread's four words at `place`, counted in as many words of a warpgroup."""
    first = arith.addi(arith.muli(place, _c(128)), _thread())
    return _utils.getelementptr(_utils.memref_ptr(ref), [arith.muli(first, _c(4))], _i32())


def fill(fours: int) -> Callable:
    """-> f(ref, block): marks the block-th `fours` times four words a thread."""

    @_inline(arg_types=(_REF, _SPLAT))
    def run(ctx, ref, block):
        target = _four(ref, arith.muli(block.registers.item(), _c(fours)))
        for i in range(fours):
            text = f"st.relaxed.gpu.global.v4.b32 [$0 + {i * 2048}], {{$1, $1, $1, $1}};"
            _asm(text, [target, _c(MARK)], "l,r")

    return run


def store(kind: str) -> Callable:
    """-> f(value [64 n], ref, place): stores float32 as `kind`, in the order of threads, from `place` on.

    kind: "float32", or "bfloat16" or "float16", of which a word holds two.
    """

    @_inline(arg_types=(WGMMA, _REF, _SPLAT))
    def run(ctx, value, ref, place):
        words = [word for pair in value.registers.flat for word in _words(pair, kind)]
        target = _four(ref, place.registers.item())
        for i in range(0, len(words), 4):
            text = f"st.relaxed.gpu.global.v4.b32 [$0 + {i * 512}], {{$1, $2, $3, $4}};"
            _asm(text, [target, *words[i : i + 4]], "l,r,r,r,r")

    return run


def _words(pair: ir.Value, kind: str) -> list[ir.Value]:
    low, high = (vector.extract(pair, dynamic_position=[], static_position=[i]) for i in (0, 1))
    if kind != "float32":
        return [gather._pack(low, high, _element(kind))]
    return [_unlike_marks(arith.bitcast(_i32(), number)) for number in (low, high)]


def _element(kind: str) -> ir.Type:
    return {"bfloat16": ir.BF16Type, "float16": ir.F16Type, "float32": ir.F32Type}[kind].get()


def _unlike_marks(word: ir.Value) -> ir.Value:
    """The word, or another NaN for a mark."""
    return arith.minui(word, _c(MARK - 1))


def await_words(wanted: gather.Places, fours: Iterable[int] = (0,)) -> list[list[ir.Value]]:
    """Four words of each, zeros where nothing is to come; waits until all are there. For all threads of a warp alike.

    fours: which four words, counted from each address on.
    """
    each = [(there, source, i) for there, source in wanted for i in fours]
    types = [_i32()] * (4 * len(each))
    start = [arith.select(there, _c(MARK), _c(0)) for there, _, _ in each for _ in range(4)]
    loop = scf.WhileOp(types, start)
    before = loop.before.blocks.append(*types)
    with ir.InsertionPoint(before):
        words: list[ir.Value] = []
        for i, (_, source, four) in enumerate(each):
            words += _load_missing(list(before.arguments)[4 * i : 4 * i + 4], source, four)
        missing = _asm("vote.sync.ballot.b32 $0, $1, 0xffffffff;", [_any_mark(words)], "=r,b", _i32())
        scf.condition(arith.cmpi(arith.CmpIPredicate.ne, missing, _c(0)), words)
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.yield_(list(after.arguments))
    found = list(loop.results)
    return [found[i : i + 4] for i in range(0, len(found), 4)]


def _any_mark(words: list[ir.Value]) -> ir.Value:
    return functools.reduce(arith.ori, [arith.cmpi(arith.CmpIPredicate.eq, word, _c(MARK)) for word in words])


def _load_missing(words: list[ir.Value], source: ir.Value, four: int) -> list[ir.Value]:
    """Loads all four words anew if any is a mark."""
    loaded = _asm(
        f"@$8 ld.relaxed.gpu.global.v4.b32 {{$0, $1, $2, $3}}, [$9 + {four * 2048}];",
        [*words, _any_mark(words), source],
        "=r,=r,=r,=r,0,1,2,3,b,l",
        ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
    )
    return [llvm.extractvalue(_i32(), loaded, [i]) for i in range(4)]


def sum_up(split: Split, blocks: int, batch: int, width: int, gated: bool) -> Callable:
    """-> f(parts, tile, block, column) -> float32 [64 width]: the sum of the partial sums of 64 neurons of a tile.

    gated: other sums lie in registers meanwhile, or their addresses.
    parts: of float32, as `store` stored them: `blocks` of 64 neurons a partial sum, of `batch` columns.
    """
    most = split.contributions.shape[1]
    together = min(most, PLACES[gated])
    at_once = max(1, min(width // 8, REGISTERS // (4 * together)))

    @_inline(
        arg_types=(_REF, _SPLAT, _SPLAT, _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((64, width), jnp.float32, layout=WGMMA),
    )
    def run(ctx, parts, tile, block, column):
        tile, block, column = (value.registers.item() for value in (tile, block, column))
        column = arith.divui(column, _c(8))

        def places(skipped: ir.Value) -> gather.Places:
            found = []
            for number, there in gather._contributors(split, tile, together, skipped):
                place = arith.addi(arith.muli(number, _c(blocks)), block)
                place = arith.addi(arith.muli(place, _c(batch // 8)), column)
                found.append((there, _four(parts, place)))
            return found

        words: list[ir.Value] = []
        for first in range(0, width // 8, at_once):
            taken = range(first, min(width // 8, first + at_once))
            if most == together:
                words += _added([], await_words(places(_c(0)), taken), len(taken))
                continue
            loop = scf.ForOp(_c(0), _c(most), _c(together), [_zero()] * (4 * len(taken)))
            with ir.InsertionPoint(loop.body):
                found = await_words(places(loop.induction_variable), taken)
                scf.yield_(_added(list(loop.inner_iter_args), found, len(taken)))
            words += list(loop.results)
        return _fragments(words, "float32", (64, width))

    return run


def _zero() -> ir.Value:
    f32 = ir.F32Type.get()
    return arith.constant(f32, ir.FloatAttr.get(f32, 0.0))


def _added(sums: list[ir.Value], found: list[list[ir.Value]], fours: int) -> list[ir.Value]:
    """To sums, none at first, the words of float32 of each place in order: `fours` times four a place."""
    f32 = ir.F32Type.get()
    for i in range(0, len(found), fours):
        numbers = [arith.bitcast(f32, word) for four in found[i : i + fours] for word in four]
        sums = [arith.addf(a, b) for a, b in zip(sums, numbers, strict=True)] if sums else numbers
    return sums


def _fragments(words: list[ir.Value], kind: str, shape: tuple[int, int]) -> mgpu.FragmentedArray:
    """A thread's numbers (float32) or pairs of them (words of 16-bit numbers) as an array of products' layout."""
    layout, element = WGMMA.to_mgpu(), _element(kind)
    pair = ir.VectorType.get((2,), element)
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    if kind == "float32":
        pairs = [vector.from_elements(pair, words[i : i + 2]) for i in range(0, len(words), 2)]
    else:
        pairs = [vector.bitcast(pair, vector.broadcast(ir.VectorType.get((1,), _i32()), w)) for w in words]
    for at, value in zip(np.ndindex(registers.shape), pairs, strict=True):
        registers[at] = value
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def take(kind: str, batch: int) -> Callable:
    """-> f(ref, block) -> [64 batch] of `kind`, 16-bit numbers: what `store` stored as the block-th."""

    @_inline(
        arg_types=(_REF, _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((64, batch), jnp.dtype(kind), layout=WGMMA),
    )
    def run(ctx, ref, block):
        first = arith.muli(block.registers.item(), _c(batch // 16))
        always = _utils.c(1, ir.IntegerType.get_signless(1))
        found = await_words([(always, _four(ref, first))], range(batch // 16))
        words = [word for four in found for word in four]
        return _fragments(words, kind, (64, batch))

    return run
