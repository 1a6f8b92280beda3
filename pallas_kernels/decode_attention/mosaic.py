"""Split-KV flash decoding over selected groups for Hopper GPUs, in Pallas Mosaic GPU.

One thread block (one warpgroup) handles one (sequence, entry of group_index, split), those of the longest sequences
first. It streams its share of the group's keys and values through a ring of TMA copies, and attends with keys as the
rows of wgmma, so that the few query heads of a group cost 8 columns instead of 64 rows. The splits of a group form a
cluster: they send their partial results to the shared memory of its first thread block, which merges them and writes the
group's rows of the result. Zeros for unselected groups are written while the first tiles are in flight. There is one
launch and no other pass.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC
from jaxtyping import Array, Float, Int

from pallas_kernels._device import Device, require_hopper, require_static_shapes
from pallas_kernels.decode_attention import exchange
from pallas_kernels.decode_attention.exchange import PER_HEAD, ROWS
from pallas_kernels.decode_attention.tiles import WIDE, Problem, Tiles, choose

KERNEL_NAME = "sparse_decode_attention"
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # for a [rows, heads] array that is stored as [heads, rows]
MASKED = -1e30  # the score of a position that doesn't count; finite, so that differences are never NaN


# Jitted so that all layers of a model share one trace, one lowering and one binary.
@functools.partial(jax.jit, static_argnames=("scale", "window", "device", "tiles", "interpret"))
def sparse_decode_attention(
    q: Float[Array, "B K G H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    lengths: Int[Array, " B"],
    group_index: Int[Array, "B k"] | None,
    *,
    scale: float,
    window: int | None = None,
    device: Device,
    tiles: Tiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "B K G H"]:
    """See `pallas_kernels.sparse_decode_attention`; `tiles=None` uses `tiles.choose`, `interpret` runs on a CPU.

    Raises NotImplementedError for a device, dtype or shape that the kernel can't do.
    """
    require_hopper(device)
    require_static_shapes(q, k, lengths if group_index is None else group_index)
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16; got {q.dtype}")
    selected = q.shape[1] if group_index is None else group_index.shape[1]
    problem = Problem.of(q.shape, k.shape, selected)
    problem.require_supported()
    tiles = tiles or choose(problem, str(q.dtype), device)
    tiles.require_fit(problem, device)
    ordered = problem.batch > 1 and problem.batch * selected * tiles.splits > device.num_sms
    factor = scale * math.log2(math.e)
    kernel = _Kernel(
        problem, tiles, factor, window, jnp.dtype(q.dtype), ordered, group_index is None, interpret
    )
    lengths = lengths.astype(jnp.int32)
    order = (longest_first(lengths, window or problem.capacity),) if ordered else ()
    index = () if group_index is None else (group_index.astype(jnp.int32),)
    return kernel.build()(q, k, v, lengths, *order, *index)[0]


def longest_first(lengths: Int[Array, " B"], most: int) -> Int[Array, " B"]:
    """The sequences' numbers, those with the most positions to read first: a long one that began late would run alone.

    All layers of a model share it. Counting is used because XLA's sorts can't be in a CUDA graph.
    """
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    work = jnp.clip(lengths, 0, most)
    before = (work[None] > work[:, None]) | ((work[None] == work[:, None]) & (rows[None] < rows[:, None]))
    rank = jnp.sum(before, 1, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank[None] == rows[:, None], rows[None], 0), 1, dtype=jnp.int32)


class _Work(NamedTuple):
    """A thread block's work: `steps` blocks of positions from `origin` on, of which [start, end) count."""

    row: jax.Array
    group: jax.Array
    present: jax.Array
    origin: jax.Array
    start: jax.Array
    end: jax.Array
    steps: jax.Array


class _State(NamedTuple):
    """A running softmax: 64-row pieces of the result [H, heads], maximum [heads], sum of the weights."""

    out: tuple[jax.Array, ...]
    peak: jax.Array
    total: jax.Array


class _Part(NamedTuple):
    """A split's result: 64-row pieces of [H, heads], and log2 of the sum of its weights [heads]."""

    out: tuple[jax.Array, ...]
    weight: jax.Array


class _Ring(NamedTuple):
    """A ring buffer: copies blocks of keys or values from `source` into the slots of `shared`."""

    source: Any
    shared: Any
    full: Any

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.shared.shape[0]))

    def fetch(self, work: _Work, step: jax.Array) -> None:
        """Copies a block; of the last one, only as many times 64 positions (1, 2 or 4) as count."""
        _, block, columns = self.shared.shape
        width = self.source.shape[-1]
        origin, slot = work.origin + step * block, self.slot(step)

        def copy(first: int, rows: int) -> None:
            there = self.source.at[work.row, work.group, pl.ds(origin + first, rows), :]
            here = self.shared.at[slot, pl.ds(first, rows), pl.ds(0, width)]
            plgpu.copy_gmem_to_smem(there, here, self.full.at[slot])

        if columns != width:  # a copy fills one row of a slot's tiles
            for first in range(0, block, 8):
                copy(first, 8)
        elif block == WIDE:
            copy(0, block)
        else:
            left = work.end - origin
            for fewer, rows in pairwise(size for size in (0, WIDE, 2 * WIDE, 4 * WIDE) if size <= block):
                enough = left <= rows if rows < block else True
                pl.when((left > fewer) & enough)(lambda rows=rows: copy(0, rows))


@dataclass(frozen=True)
class _Kernel:
    problem: Problem
    tiles: Tiles
    factor: float  # scale · log2(e): the softmax is taken in base 2
    window: int | None
    dtype: Any
    ordered: bool  # longest sequences first
    dense: bool
    interpret: plgpu.InterpretGPUParams | None

    def build(self) -> Callable[..., Any]:
        """The function (q, k, v, lengths[, order][, group_index]) -> [out], and partial results when interpreted."""
        p, t = self.problem, self.tiles
        out = [jax.ShapeDtypeStruct((p.batch, p.groups, p.queries, p.width), self.dtype)]
        cluster: dict[str, Any] = {}
        if t.splits > 1:
            cluster = {"cluster": (t.splits,), "cluster_names": ("split",)}
            if self.interpret is not None:
                share = (p.batch, p.selected, t.splits)
                out.append(jax.ShapeDtypeStruct((*share, len(p.row_pieces), WIDE, p.heads), jnp.float32))
                out.append(jax.ShapeDtypeStruct((*share, p.heads), jnp.float32))
        return plgpu.kernel(
            self._body,
            out_type=out,
            scratch_types=self._scratch(),
            grid=(p.batch, p.selected),
            grid_names=("row", "entry"),
            num_threads=1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name=KERNEL_NAME,
            interpret=self.interpret,
            **cluster,
        )

    def _scratch(self) -> dict[str, Any]:
        p, t = self.problem, self.tiles
        tiled, swizzle = (cast(Any, kind) for kind in (plgpu.TilingTransform, plgpu.SwizzleTransform))
        swizzled = (tiled((8, p.swizzle // 2)), swizzle(p.swizzle))
        scratch = {
            "q_raw": plgpu.SMEM((p.heads, p.padded_width), self.dtype),
            "q_s": plgpu.SMEM((p.heads, p.padded_width), self.dtype, transforms=swizzled),
            "k_s": plgpu.SMEM((t.stages, t.block, p.width), self.dtype, transforms=swizzled),
            "v_s": plgpu.SMEM((t.stages, t.block, p.value_width), self.dtype, transforms=swizzled),
            "p_s": plgpu.SMEM((p.heads, t.block), self.dtype, transforms=swizzled),
            "o_s": plgpu.SMEM((p.heads, p.padded_width), self.dtype),
            "q_full": plgpu.Barrier(num_arrivals=1 if p.padded_width == p.width else p.queries),
            "k_full": plgpu.Barrier(num_barriers=t.stages),
            "v_full": plgpu.Barrier(
                num_barriers=t.stages, num_arrivals=1 if p.value_width == p.width else t.block // 8
            ),
        }
        if t.splits > 1 and self.interpret is not None:
            scratch["merge"] = plgpu.ClusterBarrier(collective_axes=("split",))  # pyrefly: ignore[bad-assignment]
        elif t.splits > 1:
            scratch["parts_s"] = plgpu.SMEM(((t.splits - 1) * p.part_words,), jnp.float32)
            scratch["merge"] = plgpu.SMEM((exchange.BARRIER,), jnp.int32)
        return scratch

    def _body(
        self, q_g, k_g, v_g, lengths_g, *refs, q_raw, q_s, p_s, o_s, q_full, merge=None, parts_s=None, **ring
    ) -> None:
        order_g, refs = (refs[0], refs[1:]) if self.ordered else (None, refs)
        index_g, refs = (None, refs) if self.dense else (refs[0], refs[1:])
        out_g, *partial_g = refs
        work = self._work(lengths_g, order_g, index_g)
        keys = _Ring(k_g, ring["k_s"], ring["k_full"])
        values = _Ring(v_g, ring["v_s"], ring["v_full"])
        if parts_s is not None:
            exchange.expect(4 * parts_s.shape[0])(merge)
        self._fetch_queries(q_g.at[work.row, work.group], q_raw, q_full)
        for first in range(self.tiles.stages):

            @pl.when(first < work.steps)
            def _(step=first):
                keys.fetch(work, jnp.int32(step))
                values.fetch(work, jnp.int32(step))

        if index_g is not None:
            self._write_zeros(work, index_g, out_g, o_s)
        plgpu.barrier_wait(q_full)
        q_s.T[...] = plgpu.load(q_raw.T, layout=TURNED, optimized=False)
        plgpu.commit_smem()

        def step(t, state):
            return self._attend(work, t, state, keys, values, q_s, p_s)

        part = self._part(lax.fori_loop(0, work.steps, step, self._empty()))

        def write(out):
            self._write(work, out, out_g, o_s)

        if merge is None:
            write(part.out)
        elif parts_s is None:
            self._merge_interpreted(work, part, partial_g, merge, write)
        else:
            self._merge(part, parts_s, merge, write)

    def _part(self, state: _State) -> _Part:
        total = lax.max(state.total.sum(axis=0), jnp.float32(1e-30))
        out = tuple(piece * _down(1.0 / total, WIDE) for piece in state.out)
        return _Part(out, state.peak + jnp.log2(total))

    def _work(self, lengths_g, order_g, index_g) -> _Work:
        p, t = self.problem, self.tiles
        row, entry = lax.axis_index("row"), lax.axis_index("entry")
        row = row if order_g is None else order_g[row]
        group = entry if index_g is None else index_g[row, entry]
        present = (group >= 0) & (group < p.groups)
        end = lax.min(lengths_g[row], jnp.int32(p.capacity))
        start = jnp.int32(0) if self.window is None else lax.max(end - self.window, jnp.int32(0))
        origin = lax.div(start, jnp.int32(8)) * 8  # TMA copies must start at a multiple of 8
        blocks = pl.cdiv(end - origin, jnp.int32(t.block))
        first, last = jnp.int32(0), blocks
        if t.splits > 1:
            split = lax.axis_index("split")
            first, last = (lax.div((split + i) * blocks, jnp.int32(t.splits)) for i in (0, 1))
        return _Work(
            row=row,
            group=lax.max(lax.min(group, jnp.int32(p.groups - 1)), jnp.int32(0)),
            present=present,
            origin=origin + first * t.block,
            start=start,
            end=end,
            steps=jnp.where(present, last - first, 0),
        )

    def _fetch_queries(self, q_g, q_raw, full) -> None:
        p = self.problem
        if p.padded_width == p.width:
            plgpu.copy_gmem_to_smem(q_g, q_raw.at[pl.ds(0, p.queries)], full)
            return
        for query in range(p.queries):
            plgpu.copy_gmem_to_smem(q_g.at[query], q_raw.at[query, pl.ds(0, p.width)], full)

    def _write_zeros(self, work: _Work, index_g, out_g, o_s) -> None:
        """Writes zeros to this thread block's share of the groups that `index_g` does not name."""
        p, t = self.problem, self.tiles
        if p.groups == 1:
            return
        o_s[...] = jnp.zeros(o_s.shape, self.dtype)
        plgpu.commit_smem()
        entry = lax.axis_index("entry")
        share = entry if t.splits == 1 else entry * t.splits + lax.axis_index("split")
        named = [index_g[work.row, i] for i in range(p.selected)]
        for first in range(0, p.groups, p.selected * t.splits):
            group = first + share
            wanted = group < p.groups
            for name in named:
                wanted &= name != group
            pl.when(wanted)(lambda group=group: self._copy_out(o_s, out_g.at[work.row, group]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _copy_out(self, o_s, out_g) -> None:
        p = self.problem
        if p.padded_width == p.width:
            plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, p.queries)], out_g)
            return
        for query in range(p.queries):
            plgpu.copy_smem_to_gmem(o_s.at[query, pl.ds(0, p.width)], out_g.at[query])

    def _empty(self) -> _State:
        p = self.problem
        zeros = lambda rows: plgpu.layout_cast(jnp.zeros((rows, p.heads), jnp.float32), ROWS)
        peak = plgpu.layout_cast(jnp.full((p.heads,), MASKED, jnp.float32), PER_HEAD)
        return _State(tuple(zeros(WIDE) for _ in p.row_pieces), peak, zeros(self.tiles.block))

    def _attend(self, work: _Work, step, state: _State, keys: _Ring, values: _Ring, q_s, p_s) -> _State:
        p, t = self.problem, self.tiles
        slot, origin = keys.slot(step), work.origin + step * t.block
        more = step + t.stages < work.steps
        plgpu.barrier_wait(keys.full.at[slot])

        def score(acc):
            queries = q_s if p.padded_width == p.width else q_s.at[:, pl.ds(0, p.width)]
            plgpu.wgmma(acc, keys.shared.at[slot], queries.T)
            return acc[...]

        scores = pl.run_scoped(score, ACC((t.block, p.heads), jnp.float32))
        pl.when(more)(lambda: keys.fetch(work, step + t.stages))
        counts = self._counts(work, origin, (t.block, p.heads))
        scores = jnp.where(counts, scores * self.factor, MASKED)
        peak = jnp.maximum(state.peak, scores.max(axis=0))
        fade = jnp.exp2(state.peak - peak)
        weights = jnp.exp2(scores - _down(peak, t.block))
        total = state.total * _down(fade, t.block) + weights
        p_s.T[...] = plgpu.layout_cast(weights.astype(self.dtype), TURNED)
        plgpu.commit_smem()
        plgpu.barrier_wait(values.full.at[slot])
        pl.when((origin + t.block > work.end) | (origin < work.start))(
            lambda: self._clear_uncounted(work, origin, values.shared.at[slot])
        )

        def combine(*accs):
            for acc, first in zip(accs, p.row_pieces, strict=True):
                plgpu.wgmma(acc, values.shared.at[slot, :, pl.ds(first, WIDE)].T, p_s.T)
            return tuple(acc[...] for acc in accs)

        added = pl.run_scoped(combine, *(ACC((WIDE, p.heads), jnp.float32) for _ in p.row_pieces))
        out = tuple(old * _down(fade, WIDE) + new for old, new in zip(state.out, added, strict=True))
        pl.when(more)(lambda: values.fetch(work, step + t.stages))
        return _State(out, peak, total)

    def _counts(self, work: _Work, origin, shape: tuple[int, int]) -> jax.Array:
        position = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ROWS) + origin
        counts = position < work.end
        return counts if self.window is None else counts & (position >= work.start)

    def _clear_uncounted(self, work: _Work, origin, block_s) -> None:
        """Zeros the rows of a block of values that don't count: their weight is 0, but 0 · NaN is NaN."""
        for first in range(0, self.tiles.block, WIDE):
            for column in self.problem.row_pieces:
                piece = block_s.at[pl.ds(first, WIDE), pl.ds(column, WIDE)]
                counts = self._counts(work, origin + first, (WIDE, WIDE))
                piece[...] = jnp.where(counts, plgpu.load(piece, layout=ROWS), jnp.zeros((), self.dtype))
        plgpu.commit_smem()

    def _merge(self, part: _Part, parts_s, merge, write) -> None:
        """The cluster's first thread block merges what the others send to its shared memory, and writes the result."""
        split, problem = lax.axis_index("split"), self.problem
        exchange.join()

        @pl.when(split != 0)
        def _():
            exchange.send(problem)(*part.out, part.weight, parts_s, merge, split - 1)

        @pl.when(split == 0)
        def _():
            exchange.wait(merge)
            parts = [part]
            for sender in range(self.tiles.splits - 1):
                *out, weight = (
                    exchange.receive(problem, sender, piece)(parts_s) for piece in range(len(part.out) + 1)
                )
                parts.append(_Part(tuple(out), weight))
            write(_merged(parts))

    def _merge_interpreted(self, work: _Work, part: _Part, partial_g, merge, write) -> None:
        """Like `_merge`, but through device memory: the interpreter can't reach another block's shared memory."""
        out_g, weight_g = (ref.at[work.row, lax.axis_index("entry")] for ref in partial_g)
        split = lax.axis_index("split")
        for piece, array in enumerate(part.out):
            out_g[split, piece] = array
        weight_g[split] = part.weight
        plgpu.barrier_arrive(merge)
        plgpu.barrier_wait(merge)

        @pl.when(split == 0)
        def _():
            parts = [
                _Part(tuple(out_g[i, piece] for piece in range(len(part.out))), weight_g[i])
                for i in range(self.tiles.splits)
            ]
            write(_merged(parts))

    def _write(self, work: _Work, out, out_g, o_s) -> None:
        for piece, first in zip(out, self.problem.row_pieces, strict=True):
            turned = plgpu.layout_cast(piece.astype(self.dtype), TURNED)
            _store_unoptimized(o_s.at[:, pl.ds(first, WIDE)].T, turned)
        plgpu.commit_smem()
        pl.when(work.present)(lambda: self._copy_out(o_s, out_g.at[work.row, work.group]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _merged(parts: Sequence[_Part]) -> tuple[jax.Array, ...]:
    """The softmax over the positions of all parts."""
    peak = functools.reduce(jnp.maximum, (part.weight for part in parts))
    weights = [jnp.exp2(part.weight - peak) for part in parts]
    share = 1.0 / functools.reduce(jnp.add, weights)
    weighted = [
        [piece * _down(weight * share, WIDE) for piece in part.out]
        for part, weight in zip(parts, weights, strict=True)
    ]
    return tuple(functools.reduce(jnp.add, pieces) for pieces in zip(*weighted, strict=True))


def _down(per_head: jax.Array, rows: int) -> jax.Array:
    """[heads] repeated over `rows` rows."""
    return lax.broadcast_in_dim(per_head, (rows, per_head.shape[0]), [1])


def _store_unoptimized(ref: Any, array: jax.Array) -> None:
    """Stores with bank conflicts, which the layout can't avoid; JAX 0.12 requires `optimized=False`, 0.11 lacks it."""
    store: Any = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = array
    else:
        store(ref, array, optimized=False)
