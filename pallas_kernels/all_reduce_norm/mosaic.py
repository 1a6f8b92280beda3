"""Sums over the GPUs of a host, adds to a residual stream and normalizes, in one kernel (Pallas Mosaic GPU).

A thread block has a row. Each device writes its part into the others' memory, beside a mark. `connect` makes the memory
that a device receives in, and finds out where the others' lies: JAX tells a kernel that once a program, so the kernels
that sum get addresses as an array. Data travels in words of 8 bytes, 4 of them a mark that differs from sum to sum,
which a GPU writes at once: whoever sees the mark has the data, without fences or signals. Two sums in a row use
different halves of the memory. A device that begins a sum has all that the others sent for the last one, so they have
read what it sent for the one before, and that half is free. Not interpretable.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref
from jaxtyping import Array, Float, Int

from pallas_kernels._inline import REF, SPLAT, WARPGROUP, as_index, asm, f32, i32, i64, inline, real, utils
from pallas_kernels._inline import constant as c
from pallas_kernels.all_reduce_norm.problem import VECTOR, Link, Problem, words

CONNECTING = 16  # thread blocks of `connect`
_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True,
    skip_device_barrier=True,  # `connect` waits for the other devices itself
)


# ---- connecting


def connect(after: Array, *, elements: int, devices: int, stride: int) -> Link:
    """Memory for sums of up to `elements` bfloat16 over `devices` devices; collective.

    Args:
      after: ready only when this device has made all sums with earlier memory.
      elements: bfloat16 of the largest sum.
      devices: devices that sum, along one axis of the mesh.
      stride: by how much the number of a device in the mesh grows along that axis.
    """
    vectors = -(-words(elements, devices) // (4 * CONNECTING * WARPGROUP))  # of a thread

    def body(after_ref, memory_ref, addresses_ref, flags_ref):
        del after_ref
        run = _connect(vectors, devices, stride)
        run(memory_ref, addresses_ref, flags_ref, lax.axis_index("block"))

    memory, addresses = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((vectors * 4 * CONNECTING * WARPGROUP,), jnp.uint32),
            jax.ShapeDtypeStruct((devices + 1, 2), jnp.uint32),
        ),
        grid=(CONNECTING,),
        grid_names=("block",),
        scratch_types=[plgpu.SemaphoreType.REGULAR((devices * CONNECTING,))],
        compiler_params=_PARAMS,
        kernel_name="connect",
    )(after)
    return Link(memory, addresses)


def _connect(vectors: int, devices: int, stride: int) -> Callable:
    """-> f(memory, addresses, flags, block): zeros the memory, waits for the other devices, writes addresses."""

    @inline(arg_types=(REF, REF, REF, SPLAT))
    def run(ctx, memory, addresses, flags, block):
        block = block.registers.item()
        base = utils.memref_ptr(memory)
        first = arith.muli(arith.addi(arith.muli(block, c(WARPGROUP)), utils.thread_idx()), c(4))
        for i in range(vectors):
            at = arith.addi(first, c(i * CONNECTING * WARPGROUP * 4))
            asm("st.global.v4.b32 [$0], {$1, $1, $1, $1};", [_word(base, at), c(0)], "l,r,~{memory}")
        utils.warpgroup_barrier()
        rank = ctx.device_id()
        number = arith.remui(arith.divui(rank, c(stride)), c(devices))
        peers = [
            arith.addi(rank, arith.muli(arith.subi(c(other), number), c(stride))) for other in range(devices)
        ]
        with utils.when(_equal(utils.thread_idx(), c(0))):
            asm("fence.acq_rel.sys;", [], "~{memory}")
            here = utils.memref_ptr(flags)
            for other, peer in enumerate(peers):
                there = utils.memref_ptr(ctx.to_remote(flags, peer))
                _meet(
                    _word(there, arith.addi(arith.muli(number, c(CONNECTING)), block)),
                    _word(here, arith.addi(c(other * CONNECTING), block)),
                )
            asm("fence.acq_rel.sys;", [], "~{memory}")
            with utils.when(_equal(block, c(0))):
                for other, peer in enumerate(peers):
                    address = llvm.ptrtoint(i64(), utils.memref_ptr(ctx.to_remote(memory, peer)))
                    _store_pair(addresses, other, address)
                _store_pair(addresses, devices, arith.extui(i64(), number))

    return run


def _meet(theirs: ir.Value, mine: ir.Value) -> None:
    """Waits until the same block of another device is here, and then until that one knows it.

    Flags are zero on this device, but another one's may not be yet: they are set to 1 until an answer comes. The last
    that a device sets is 2, so nothing comes after a 2, and flags are zero again when all have met.
    """
    asm(
        """{ .reg .pred p; .reg .b32 seen; again:
        st.volatile.global.b32 [$0], 1; ld.volatile.global.b32 seen, [$1];
        setp.eq.b32 p, seen, 0; @p bra again;
        st.volatile.global.b32 [$0], 2; twice:
        ld.volatile.global.b32 seen, [$1]; setp.ne.b32 p, seen, 2; @p bra twice;
        st.volatile.global.b32 [$1], 0; }""",
        [theirs, mine],
        "l,l,~{memory}",
    )


# ---- summing, adding and normalizing


@functools.partial(jax.jit, static_argnames="problem")
def all_reduce_norm(
    update: Float[Array, "*S B D"],
    x: Float[Array, "B D"],
    *vectors: Float[Array, "D"],
    link: Link,
    number: Int[Array, "1"],
    problem: Problem,
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """See `pallas_kernels.all_reduce_norm`; `vectors`: scale and, where there are, bias and shift.

    Jitted, so that all layers of a model share one trace, one lowering and one binary.
    """
    given = [update, x, *vectors, *link, number]

    def body(*refs):
        _row(problem, len(given))(*refs, lax.axis_index("row"))

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2,
        grid=(problem.rows,),
        grid_names=("row",),
        num_threads=problem.warpgroups,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((2, 4 * problem.warpgroups), jnp.float32)],
        compiler_params=_PARAMS,
        kernel_name="all_reduce_norm",
    )(*given)


def _row(problem: Problem, given: int) -> Callable:
    """-> f(*inputs, stream, normed, sums, row): what the calling thread does of a row."""

    @inline(arg_types=(*[REF] * (given + 3), SPLAT))
    def run(ctx, update, x, scale, *args):
        *more, stream, normed, sums, row = args
        bias = more.pop(0) if problem.biased else None
        shift = more.pop(0) if problem.shifted else None
        thread = utils.thread_idx()
        places = [arith.addi(thread, c(i * problem.threads)) for i in range(problem.vectors)]  # in the row
        first = arith.muli(row.registers.item(), c(problem.width // VECTOR))
        vectors = [arith.addi(first, place) for place in places]
        exchange = _Exchange(problem, *more)
        for vector in vectors:
            exchange.send(vector, _own_part(problem, update, vector))
        old = [_load_numbers(x, vector) for vector in vectors]
        factors = [_load_numbers(scale, place) for place in places]
        biases = None if bias is None else [_load_numbers(bias, place) for place in places]
        shifts = None if shift is None else [_load_numbers(shift, place) for place in places]
        values = []
        for i, vector in enumerate(vectors):
            total = exchange.receive(vector)
            total = total if biases is None else _add(total, biases[i])
            words = _packed(_add(old[i], total))
            _store_vector(stream, vector, words)
            values.append(_numbers(words))
        for i, found in enumerate(_normalized(values, factors, problem, sums, thread)):
            _store_vector(normed, vectors[i], _packed(found if shifts is None else _add(found, shifts[i])))

    return run


def _own_part(problem: Problem, update, vector: ir.Value) -> list[ir.Value]:
    """The words of a vector of this device's part."""
    if not problem.summands:
        return _load_vector(update, vector)
    apart, parts = problem.rows * problem.width // 4, []  # 4 float32 are 16 bytes
    for i in range(problem.summands):
        first = arith.addi(arith.muli(vector, c(2)), c(i * apart))
        quads = [_load_vector(update, arith.addi(first, c(half))) for half in range(2)]
        parts.append([arith.bitcast(f32(), word) for quad in quads for word in quad])
    return _packed(functools.reduce(_add, parts))


def _normalized(values, factors, problem: Problem, sums, thread) -> list[list[ir.Value]]:
    """A thread's vectors of a row, normalized and scaled."""
    if problem.kind == "layer":
        mean = arith.mulf(_block_sum(values, sums, 0, problem, thread), real(1 / problem.width))
        values = [[arith.subf(value, mean) for value in vector] for vector in values]
    squares: list[list[ir.Value]] = [[arith.mulf(value, value) for value in vector] for vector in values]
    square = arith.mulf(_block_sum(squares, sums, 1, problem, thread), real(1 / problem.width))
    root = asm("rsqrt.approx.f32 $0, $1;", [arith.addf(square, real(problem.eps))], "=f,f", f32())
    scaled = [[arith.mulf(value, root) for value in vector] for vector in values]
    return [
        [arith.mulf(value, factor) for value, factor in zip(*pair, strict=True)]
        for pair in zip(scaled, factors, strict=True)
    ]


class _Exchange:
    """Sends vectors of a row to all devices, and adds what they sent."""

    def __init__(self, problem: Problem, memory, addresses, number):
        elements = problem.rows * problem.width
        self._devices = problem.devices
        self._plane = elements * 2  # bytes of half of a sender's vectors, with their marks
        self._sender = elements * 4  # bytes that a sender sends
        table, here = utils.memref_ptr(addresses), utils.memref_ptr(memory)
        self._mark = _load_word(utils.memref_ptr(number), 0)
        self._half = arith.muli(arith.andi(self._mark, c(1)), c(self._devices * self._sender))
        self._own = arith.muli(_load_word(table, 2 * self._devices), c(self._sender))
        self._there = [
            asm(
                "mov.b64 $0, {$1, $2};",
                [_load_word(table, 2 * i), _load_word(table, 2 * i + 1)],
                "=l,r,r",
                i64(),
            )
            for i in range(self._devices)
        ]
        self._here = llvm.ptrtoint(i64(), here)

    def _place(self, vector: ir.Value, sender: ir.Value) -> ir.Value:
        """Where the first half of a sender's vector goes: bytes from the beginning of a device's memory."""
        return arith.extui(i64(), arith.addi(arith.addi(self._half, sender), arith.muli(vector, c(16))))

    def send(self, vector: ir.Value, words: list[ir.Value]) -> None:
        place = self._place(vector, self._own)
        for base in self._there:
            for i in range(2):
                asm(
                    f"st.volatile.global.v4.b32 [$0+{i * self._plane}], {{$1, $3, $2, $3}};",
                    [arith.addi(base, place), *words[2 * i : 2 * i + 2], self._mark],
                    "l,r,r,r,~{memory}",
                )

    def receive(self, vector: ir.Value) -> list[ir.Value]:
        parts = []
        for sender in range(self._devices):
            address = arith.addi(self._here, self._place(vector, c(sender * self._sender)))
            parts.append(_numbers([word for i in range(2) for word in self._wait(address, i * self._plane)]))
        return functools.reduce(_add, parts)

    def _wait(self, address: ir.Value, offset: int) -> list[ir.Value]:
        """Two words of data, once both have the mark."""
        found = asm(
            f"""{{ .reg .pred p; .reg .b32 a, b; again:
            ld.volatile.global.v4.b32 {{$0, a, $1, b}}, [$2+{offset}];
            setp.ne.b32 p, a, $3; @p bra again; setp.ne.b32 p, b, $3; @p bra again; }}""",
            [address, self._mark],
            "=&r,=&r,l,r,~{memory}",
            ir.Type.parse("!llvm.struct<(i32, i32)>"),
        )
        return [llvm.extractvalue(i32(), found, [i]) for i in range(2)]


def _block_sum(
    vectors: list[list[ir.Value]], sums, slot: int, problem: Problem, thread: ir.Value
) -> ir.Value:
    """The sum over all values of a block's threads; `slot` is a row of `sums` that no other sum uses."""
    total, *values = [value for vector in vectors for value in vector]
    for value in values:
        total = arith.addf(total, value)
    for distance in (16, 8, 4, 2, 1):
        other = asm("shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", [total, c(distance)], "=f,f,r", f32())
        total = arith.addf(total, other)
    lane, warp = arith.remui(thread, c(32)), arith.divui(thread, c(32))
    at = lambda index: [as_index(c(slot)), as_index(index)]
    with utils.when(_equal(lane, c(0))):
        memref.store(total, sums, at(warp))
    gpu.barrier()
    total = memref.load(sums, at(c(0)))
    for i in range(1, 4 * problem.warpgroups):
        total = arith.addf(total, memref.load(sums, at(c(i))))
    return total


# ---- words and numbers


def _load_vector(ref, vector: ir.Value) -> list[ir.Value]:
    """The words of a vector."""
    address = _word(utils.memref_ptr(ref), arith.muli(vector, c(4)))
    four = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    found = asm("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "=r,=r,=r,=r,l,~{memory}", four)
    return [llvm.extractvalue(i32(), found, [i]) for i in range(4)]


def _load_numbers(ref, vector: ir.Value) -> list[ir.Value]:
    return _numbers(_load_vector(ref, vector))


def _store_vector(ref, vector: ir.Value, words: list[ir.Value]) -> None:
    address = _word(utils.memref_ptr(ref), arith.muli(vector, c(4)))
    asm("st.global.v4.b32 [$0], {$1, $2, $3, $4};", [address, *words], "l,r,r,r,r,~{memory}")


def _load_word(base: ir.Value, at: int) -> ir.Value:
    return asm("ld.global.b32 $0, [$1];", [_word(base, c(at))], "=r,l,~{memory}", i32())


def _store_pair(addresses, row: int, value: ir.Value) -> None:
    asm("st.global.b64 [$0], $1;", [_word(utils.memref_ptr(addresses), c(2 * row)), value], "l,l,~{memory}")


def _word(base: ir.Value, at: ir.Value) -> ir.Value:
    """The address of a 4-byte word."""
    return arith.addi(llvm.ptrtoint(i64(), base), arith.muli(arith.extui(i64(), at), utils.c(4, i64())))


def _equal(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def _add(a: list[ir.Value], b: list[ir.Value]) -> list[ir.Value]:
    return [arith.addf(first, second) for first, second in zip(a, b, strict=True)]


def _numbers(words: list[ir.Value]) -> list[ir.Value]:
    """The bfloat16 of words as float32."""
    halves = [half for word in words for half in (arith.shli(word, c(16)), arith.andi(word, c(-65536)))]
    return [arith.bitcast(f32(), half) for half in halves]


def _packed(values: list[ir.Value]) -> list[ir.Value]:
    """float32 as words of two bfloat16."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return [asm("cvt.rn.bf16x2.f32 $0, $1, $2;", [high, low], "=r,f,f", i32()) for low, high in pairs]
