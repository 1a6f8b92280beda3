"""Values in device memory that are pre-filled with a sentinel, the mark; readers spin until it is overwritten.

Thread blocks then need no fence and no semaphore to pass values on. A block's loader places its marks while the first
weights are in flight. This is safe because (1) a value is stored after its mark: consumers wait for their loader;
(2) a block reads only after all blocks have announced their marks; and (3) no value equals the mark, because
`_unlike_marks` and the rounding to 16 bits exclude it.
"""

import functools
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from pallas_kernels._inline import REF, SPLAT, asm, f32, i32, inline, real, utils
from pallas_kernels._inline import constant as c
from pallas_kernels.sparse_mlp.mosaic import partials
from pallas_kernels.sparse_mlp.mosaic.partials import FOUR_BYTES, Places, Words, address, element
from pallas_kernels.sparse_mlp.schedule import Split

MARK = -1  # all bits set: a NaN that no conversion produces
WGMMA = plgpu.Layout.WGMMA
REGISTERS = 64  # per thread, for partial sums in flight
PLACES = {False: 8, True: 3}  # partial sums awaited together, by whether the MLP is gated; more would spill


def fill(fours: int) -> Callable:
    """-> f(ref, block): places marks in the `block`-th run of `fours` 4-word slots per thread."""

    @inline(arg_types=(REF, SPLAT))
    def run(ctx, ref, block):
        target = address(ref, arith.muli(block.registers.item(), c(fours)))
        for i in range(fours):
            text = f"st.relaxed.gpu.global.v4.b32 [$0 + {i * FOUR_BYTES}], {{$1, $1, $1, $1}};"
            asm(text, [target, c(MARK)], "l,r")

    return run


def store(kind: str) -> Callable:
    """`partials.store` that never stores a mark."""
    change = _unlike_marks if kind == "float32" else None
    return partials.store(kind, how="st.relaxed.gpu.global", change=change)


def _unlike_marks(word: ir.Value) -> ir.Value:
    """The word; a different NaN if it equals the mark."""
    return arith.minui(word, c(MARK - 1))


def await_words(wanted: Places, fours: Iterable[int] = (0,)) -> list[Words]:
    """Waits for and loads four words from each place, zeros where nothing will be stored. All threads of a warp call it.

    fours: which 4-word slots to load, counted from each address.
    """
    each = [(there, source, i) for there, source in wanted for i in fours]
    types = [i32()] * (4 * len(each))
    start = [arith.select(there, c(MARK), c(0)) for there, _, _ in each for _ in range(4)]
    loop = scf.WhileOp(types, start)
    before = loop.before.blocks.append(*types)
    with ir.InsertionPoint(before):
        words: Words = []
        for i, (_, source, four) in enumerate(each):
            words += _load_missing(list(before.arguments)[4 * i : 4 * i + 4], source, four)  # pyrefly: ignore[bad-argument-type]
        missing = asm("vote.sync.ballot.b32 $0, $1, 0xffffffff;", [_any_mark(words)], "=r,b", i32())
        scf.condition(arith.cmpi(arith.CmpIPredicate.ne, missing, c(0)), words)
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.yield_(list(after.arguments))
    found = list(loop.results)
    return [found[i : i + 4] for i in range(0, len(found), 4)]  # pyrefly: ignore[bad-return]


def _any_mark(words: Words) -> ir.Value:
    return functools.reduce(arith.ori, [arith.cmpi(arith.CmpIPredicate.eq, word, c(MARK)) for word in words])


def _load_missing(words: Words, source: ir.Value, four: int) -> list[ir.Value]:
    """Loads all four words again if any is still a mark."""
    text = f"@$8 ld.relaxed.gpu.global.v4.b32 {{$0, $1, $2, $3}}, [$9 + {four * FOUR_BYTES}];"
    return partials.load_four(text, [*words, _any_mark(words), source], "=r,=r,=r,=r,0,1,2,3,b,l")


def sum_up(split: Split, blocks: int, batch: int, width: int, gated: bool) -> Callable:
    """-> f(parts, tile, block, column) -> float32 [64 width]: adds up the partial sums of 64 neurons of a tile.

    `parts` holds float32, as `store` leaves them: `blocks` times 64 neurons in each partial sum, and `batch` columns.
    With `gated`, fewer loads are in flight, because the other matrix's sums or addresses occupy registers too.
    """
    most = split.contributions.shape[1]
    together = min(most, PLACES[gated])
    at_once = max(1, min(width // 8, REGISTERS // (4 * together)))

    @inline(
        arg_types=(REF, SPLAT, SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((64, width), jnp.float32, layout=WGMMA),
    )
    def run(ctx, parts, tile, block, column):
        tile, block, column = (value.registers.item() for value in (tile, block, column))
        column = arith.divui(column, c(8))

        def places(skipped: ir.Value) -> Places:
            found = []
            for number, there in partials.contributors(split, tile, together, skipped):
                place = arith.addi(arith.muli(number, c(blocks)), block)
                place = arith.addi(arith.muli(place, c(batch // 8)), column)
                found.append((there, address(parts, place)))
            return found

        words: Words = []
        for first in range(0, width // 8, at_once):
            taken = range(first, min(width // 8, first + at_once))
            if most == together:
                words += _added([], await_words(places(c(0)), taken), len(taken))
                continue
            loop = scf.ForOp(c(0), c(most), c(together), [real(0.0)] * (4 * len(taken)))
            with ir.InsertionPoint(loop.body):
                found = await_words(places(loop.induction_variable), taken)
                scf.yield_(_added(list(loop.inner_iter_args), found, len(taken)))
            words += list(loop.results)
        return _fragments(words, "float32", (64, width))

    return run


def _added(sums: list[ir.Value], found: list[Words], fours: int) -> list[ir.Value]:
    """Adds the float32 words of each place, `fours` times four, to `sums` (empty at first), in order."""
    for i in range(0, len(found), fours):
        numbers = [arith.bitcast(f32(), word) for four in found[i : i + fours] for word in four]
        sums = [arith.addf(a, b) for a, b in zip(sums, numbers, strict=True)] if sums else numbers  # pyrefly: ignore[bad-assignment]
    return sums


def _fragments(words: Words, kind: str, shape: tuple[int, int]) -> mgpu.FragmentedArray:
    """A thread's words, each a float32 or two 16-bit values, as an array in the layout of wgmma's results."""
    layout = WGMMA.to_mgpu()
    pair = ir.VectorType.get((2,), element(kind))
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    if kind == "float32":
        pairs = [vector.from_elements(pair, words[i : i + 2]) for i in range(0, len(words), 2)]
    else:
        pairs = [vector.bitcast(pair, vector.broadcast(ir.VectorType.get((1,), i32()), w)) for w in words]
    for at, value in zip(np.ndindex(registers.shape), pairs, strict=True):
        registers[at] = value
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def take(kind: str, batch: int) -> Callable:
    """-> f(ref, block) -> [64 batch] of the 16-bit dtype `kind`: waits for what `store` puts in the `block`-th place."""

    @inline(
        arg_types=(REF, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((64, batch), jnp.dtype(kind), layout=WGMMA),
    )
    def run(ctx, ref, block):
        first = arith.muli(block.registers.item(), c(batch // 16))
        always = utils.c(1, ir.IntegerType.get_signless(1))
        found = await_words([(always, address(ref, first))], range(batch // 16))
        words = [word for four in found for word in four]
        return _fragments(words, kind, (64, batch))

    return run
