"""Split-KV flash decoding over selected groups for Hopper GPUs, in Pallas Mosaic GPU.

One warpgroup takes one (sequence, entry of group_index, share of the positions): it streams its keys and values
through a ring of TMA copies, and attends with keys as the rows of wgmma, so that the few query heads of a group cost
8 columns and not 64 rows. A group's warpgroups lie in the thread blocks (splits) of one cluster: they send their
partial results into the shared memory of the first, which merges them and writes the group's rows of the result.
Zeros for unselected groups are written on the way, while the first tiles are in flight. One launch, no pass before
or after it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import ACC  # pyright: ignore[reportPrivateImportUsage]
from jaxtyping import Array, Float, Int

from pallas_kernels._device import Device, require_hopper
from pallas_kernels.decode_attention import exchange
from pallas_kernels.decode_attention.tiles import WIDE, Problem, Tiles, choose

KERNEL_NAME = "sparse_decode_attention"
ROWS = plgpu.Layout.WGMMA
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # of a [rows, heads] array that is stored as [heads, rows]
PER_HEAD = ROWS.reduce(0)
REDUCTION = 512  # float32 of scratch memory for sums and maxima over the rows of an array
NEVER = -1e30  # the score of a position that doesn't count; finite, so that no difference of two is NaN


# Jitted, so that the layers of a model share one trace, one lowering and one binary.
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
    """As `pallas_kernels.sparse_decode_attention`; `tiles=None` takes `tiles.choose`'s, `interpret` runs on a CPU.

    Raises NotImplementedError for a device, dtype or shape that the kernel can't do.
    """
    require_hopper(device)
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16; got {q.dtype}")
    selected = q.shape[1] if group_index is None else group_index.shape[1]
    problem = Problem.of(q.shape, k.shape, selected)
    problem.require_supported()
    tiles = tiles or choose(problem, str(q.dtype), device)
    tiles.require_fit(problem, device)
    kernel = _Kernel(
        problem, tiles, scale * math.log2(math.e), window, jnp.dtype(q.dtype), group_index is None, interpret
    )
    index = () if group_index is None else (group_index.astype(jnp.int32),)
    return kernel.build()(q, k, v, lengths.astype(jnp.int32), *index)[0]


class _Work(NamedTuple):
    """What a thread block does: `steps` blocks of positions from `origin` on, of which [start, end) count."""

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
    """A share's result: 64-row pieces of [H, heads], and log2 of the sum of its weights [heads]."""

    out: tuple[jax.Array, ...]
    weight: jax.Array


class _Ring(NamedTuple):
    """Blocks of keys or values on their way from `source` into slots [first, first + stages) of `shared`."""

    source: Any
    shared: Any
    full: Any
    first: jax.Array
    stages: int

    def slot(self, step: jax.Array) -> jax.Array:
        return self.first + lax.rem(step, jnp.int32(self.stages))

    def fetch(self, work: _Work, step: jax.Array) -> None:
        _, block, columns = self.shared.shape
        width = self.source.shape[-1]
        rows = (
            block if columns == width else 8
        )  # a copy fills whole columns of a slot, or one row of its tiles
        slot = self.slot(step)
        for first in range(0, block, rows):
            there = self.source.at[work.row, work.group, pl.ds(work.origin + step * block + first, rows), :]
            here = (
                self.shared.at[slot, pl.ds(first, rows), pl.ds(0, width)]
                if rows < block
                else self.shared.at[slot]
            )
            plgpu.copy_gmem_to_smem(there, here, self.full.at[slot])


@dataclass(frozen=True)
class _Kernel:
    problem: Problem
    tiles: Tiles
    factor: float  # scale · log2(e): the softmax is taken in base 2
    window: int | None
    dtype: Any
    dense: bool
    interpret: plgpu.InterpretGPUParams | None

    def build(self) -> Callable[..., Any]:
        """The function (q, k, v, lengths[, group_index]) -> [out, ...partial results, where interpreted]."""
        p, t = self.problem, self.tiles
        out = [jax.ShapeDtypeStruct((p.batch, p.groups, p.queries, p.width), self.dtype)]
        if self._interpreted_cluster:
            out.append(jax.ShapeDtypeStruct((p.batch, p.selected, *self._parts), jnp.float32))
        return plgpu.kernel(
            self._body,
            out_type=out,
            scratch_types=self._scratch(),
            grid=(p.batch // t.neighbours, p.selected),
            grid_names=("rows", "entry"),
            cluster=(t.splits, t.neighbours),
            cluster_names=("split", "neighbour"),
            num_threads=t.warpgroups,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name=KERNEL_NAME,
            interpret=self.interpret,
        )

    @property
    def _interpreted_cluster(self) -> bool:
        """Whether parts travel through device memory: the interpreter knows no other block's shared memory."""
        return self.interpret is not None and self.tiles.splits > 1

    def _scratch(self) -> dict[str, Any]:
        p, t = self.problem, self.tiles
        tiled, swizzle = (cast(Any, kind) for kind in (plgpu.TilingTransform, plgpu.SwizzleTransform))
        swizzled = (tiled((8, p.swizzle // 2)), swizzle(p.swizzle))
        slots = t.warpgroups * t.stages
        scratch = {
            "q_raw": plgpu.SMEM((t.warpgroups, p.heads, p.padded_width), self.dtype),
            "q_s": plgpu.SMEM((t.warpgroups, p.heads, p.padded_width), self.dtype, transforms=swizzled),
            "k_s": plgpu.SMEM((slots, t.block, p.width), self.dtype, transforms=swizzled),
            "v_s": plgpu.SMEM((slots, t.block, p.value_width), self.dtype, transforms=swizzled),
            "p_s": plgpu.SMEM((t.warpgroups, p.heads, t.block), self.dtype, transforms=swizzled),
            "o_s": plgpu.SMEM((t.warpgroups, p.heads, p.padded_width), self.dtype),
            "q_full": plgpu.Barrier(
                num_barriers=t.warpgroups, num_arrivals=1 if p.padded_width == p.width else p.queries
            ),
            "k_full": plgpu.Barrier(num_barriers=slots),
            "v_full": plgpu.Barrier(
                num_barriers=slots, num_arrivals=1 if p.value_width == p.width else t.block // 8
            ),
        }
        if self.interpret is None:
            scratch["reduce_s"] = plgpu.SMEM((t.warpgroups, REDUCTION), jnp.float32)
        if self._interpreted_cluster:
            scratch["merge"] = plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=t.warpgroups)
        elif t.splits > 1:
            scratch["parts_s"] = plgpu.SMEM((self._words * (t.shares - 1),), jnp.float32)
            scratch["merge"] = plgpu.SMEM((exchange.BARRIER,), jnp.int32)
        elif t.shares > 1:
            scratch["parts_s"] = plgpu.SMEM(self._parts, jnp.float32, transforms=(tiled((8, 8)), swizzle(32)))
            scratch["merge"] = plgpu.Barrier(num_arrivals=t.shares - 1)
        return scratch

    @property
    def _words(self) -> int:
        return exchange.words(len(self.problem.row_pieces), self.problem.heads)

    @property
    def _parts(self) -> tuple[int, int, int]:
        """Shape of the parts of all shares but the first: arrays of a `_Part` one after the other, [heads] in rows."""
        return ((self.tiles.shares - 1) * (len(self.problem.row_pieces) + 1), WIDE, self.problem.heads)

    def _body(self, q_g, k_g, v_g, lengths_g, *refs, merge=None, **shared) -> None:
        t = self.tiles
        index_g = None if self.dense else refs[0]
        out_g, *partial_g = refs if self.dense else refs[1:]
        own = lax.axis_index("warpgroup")
        q_raw, q_s, p_s, o_s, q_full = (shared[n].at[own] for n in ("q_raw", "q_s", "p_s", "o_s", "q_full"))
        work = self._work(lengths_g, index_g)
        first = own * t.stages
        keys = _Ring(k_g, shared["k_s"], shared["k_full"], first, t.stages)
        values = _Ring(v_g, shared["v_s"], shared["v_full"], first, t.stages)
        remote = t.splits > 1 and not self._interpreted_cluster
        if remote:
            exchange.expect(4 * self._words * (t.shares - 1))(merge)
        self._fetch_queries(q_g.at[work.row, work.group], q_raw, q_full)
        for step in range(t.stages + 1):  # keys a step ahead: the last bytes to come are values
            if step < t.stages:
                pl.when(step < work.steps)(lambda step=step: keys.fetch(work, jnp.int32(step)))
            if step > 0:
                pl.when(step <= work.steps)(lambda step=step: values.fetch(work, jnp.int32(step - 1)))
        if index_g is not None:
            self._write_zeros(work, index_g, out_g, o_s)
        plgpu.barrier_wait(q_full)
        q_s.T[...] = plgpu.load(q_raw.T, layout=TURNED, optimized=False)
        plgpu.commit_smem()
        reduce = _Reduce(shared["reduce_s"].at[own] if "reduce_s" in shared else None)
        scores = functools.partial(self._scores, work, keys=keys, q_s=q_s)

        def step(t, carry):
            return self._attend(work, t, *carry, values, p_s, reduce, scores)

        state, _ = lax.fori_loop(0, work.steps, step, (self._empty(), scores(jnp.int32(0))))
        part = self._part(state, reduce)
        if t.shares == 1:
            self._write(work, part.out, out_g, o_s)
            return
        parts = partial_g[0].at[work.row, lax.axis_index("entry")] if partial_g else shared["parts_s"]
        send, receive = (
            (self._send_remotely, self._receive_remotely) if remote else (self._send, self._receive)
        )
        share = self._share()
        if remote:
            exchange.join()
        pl.when(share != 0)(lambda: send(part, share, parts, merge))
        if partial_g:  # a barrier of the cluster, at which all arrive
            pl.when(share == 0)(lambda: plgpu.barrier_arrive(merge))
            plgpu.barrier_wait(merge)

        @pl.when(share == 0)
        def _():
            self._write(work, _merged([part, *receive(parts, merge)]), out_g, o_s)

    def _part(self, state: _State, reduce: "_Reduce") -> _Part:
        """What a warpgroup found: a softmax over its positions, and how much that weighs beside others'."""
        total = lax.max(reduce(state.total, "add"), 1e-30)
        out = tuple(piece * _down(1.0 / total, WIDE) for piece in state.out)
        return _Part(out, state.peak + jnp.log2(total))

    def _work(self, lengths_g, index_g) -> _Work:
        p, t = self.problem, self.tiles
        row = lax.axis_index("rows") * t.neighbours + lax.axis_index("neighbour")
        entry = lax.axis_index("entry")
        group = entry if index_g is None else index_g[row, entry]
        present = (group >= 0) & (group < p.groups)
        end = lax.min(lengths_g[row], jnp.int32(p.capacity))
        start = jnp.int32(0) if self.window is None else lax.max(end - self.window, jnp.int32(0))
        origin = lax.div(start, jnp.int32(8)) * 8  # where a TMA copy may begin
        blocks = pl.cdiv(end - origin, jnp.int32(t.block))
        first, last = (lax.div((self._share() + i) * blocks, jnp.int32(t.shares)) for i in (0, 1))
        return _Work(
            row=row,
            group=lax.max(lax.min(group, jnp.int32(p.groups - 1)), jnp.int32(0)),
            present=present,
            origin=origin + first * t.block,
            start=start,
            end=end,
            steps=jnp.where(present, last - first, 0),
        )

    def _share(self) -> jax.Array:
        """Which of a group's shares the calling warpgroup takes."""
        return lax.axis_index("split") * self.tiles.warpgroups + lax.axis_index("warpgroup")

    def _fetch_queries(self, q_g, q_raw, full) -> None:
        p = self.problem
        if p.padded_width == p.width:
            plgpu.copy_gmem_to_smem(q_g, q_raw.at[pl.ds(0, p.queries)], full)
            return
        for query in range(p.queries):
            plgpu.copy_gmem_to_smem(q_g.at[query], q_raw.at[query, pl.ds(0, p.width)], full)

    def _write_zeros(self, work: _Work, index_g, out_g, o_s) -> None:
        """Zeros to this thread block's share of the groups that `index_g` does not name."""
        p, t = self.problem, self.tiles
        if p.groups == 1:
            return
        o_s[...] = jnp.zeros(o_s.shape, self.dtype)
        plgpu.commit_smem()
        entry = lax.axis_index("entry")
        share = entry * t.shares + self._share()
        named = [index_g[work.row, i] for i in range(p.selected)]
        for first in range(0, p.groups, p.selected * t.shares):
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
        peak = plgpu.layout_cast(jnp.full((p.heads,), NEVER, jnp.float32), PER_HEAD)
        return _State(tuple(zeros(WIDE) for _ in p.row_pieces), peak, zeros(self.tiles.block))

    def _scores(self, work: _Work, step, *, keys: _Ring, q_s) -> jax.Array:
        """Products of a step's keys with the queries [block, heads]; anything after the last step."""
        p, t = self.problem, self.tiles
        queries = q_s if p.padded_width == p.width else q_s.at[:, pl.ds(0, p.width)]

        def score(acc):
            plgpu.wgmma(acc, keys.shared.at[keys.slot(step)], queries.T)
            return acc[...]

        def found():
            plgpu.barrier_wait(keys.full.at[keys.slot(step)])
            scores = pl.run_scoped(score, ACC((t.block, p.heads), jnp.float32))
            pl.when(step + t.stages < work.steps)(lambda: keys.fetch(work, step + t.stages))
            return scores

        nothing = lambda: plgpu.layout_cast(jnp.zeros((t.block, p.heads), jnp.float32), ROWS)
        return lax.cond(step < work.steps, found, nothing)

    def _attend(self, work: _Work, step, state: _State, scores, values: _Ring, p_s, reduce, next_scores):
        """One step from its scores on; the scores of the next are found while its values are still on their way."""
        p, t = self.problem, self.tiles
        slot, origin = values.slot(step), work.origin + step * t.block
        counts = self._counts(work, origin, (t.block, p.heads))
        scores = jnp.where(counts, scores * self.factor, NEVER)
        peak = jnp.maximum(state.peak, reduce(scores, "max"))
        fade = jnp.exp2(state.peak - peak)
        weights = jnp.exp2(scores - _down(peak, t.block))
        total = state.total * _down(fade, t.block) + weights
        p_s.T[...] = plgpu.layout_cast(weights.astype(self.dtype), TURNED)
        plgpu.commit_smem()
        scores = next_scores(step + 1)
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
        more = step + t.stages < work.steps
        pl.when(more)(lambda: values.fetch(work, step + t.stages))
        return _State(out, peak, total), scores

    def _counts(self, work: _Work, origin, shape: tuple[int, int]) -> jax.Array:
        position = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ROWS) + origin
        counts = position < work.end
        return counts if self.window is None else counts & (position >= work.start)

    def _clear_uncounted(self, work: _Work, origin, block_s) -> None:
        """Zeros in the rows of a block of values that don't count: their weight is 0, but 0 · NaN is NaN."""
        for first in range(0, self.tiles.block, WIDE):
            for column in self.problem.row_pieces:
                piece = block_s.at[pl.ds(first, WIDE), pl.ds(column, WIDE)]
                counts = self._counts(work, origin + first, (WIDE, WIDE))
                piece[...] = jnp.where(counts, plgpu.load(piece, layout=ROWS), jnp.zeros((), self.dtype))
        plgpu.commit_smem()

    def _send(self, part: _Part, share, parts, merge) -> None:
        """Leaves a share's part in `parts`, for the first warpgroup, which waits at `merge`."""
        arrays = (*part.out, _down(part.weight, WIDE))
        for i, array in enumerate(arrays):
            _store_plainly(parts.at[(share - 1) * len(arrays) + i], array)
        plgpu.barrier_arrive(merge)

    def _receive(self, parts, merge) -> list[_Part]:
        """The parts of all shares but the first."""
        if not self._interpreted_cluster:
            plgpu.barrier_wait(merge)
        pieces = len(self.problem.row_pieces) + 1
        arrays = [plgpu.load(parts.at[i], layout=ROWS, optimized=False) for i in range(self._parts[0])]
        found = [arrays[i : i + pieces] for i in range(0, len(arrays), pieces)]
        return [_Part(tuple(out), weight.max(axis=0)) for *out, weight in found]

    def _send_remotely(self, part: _Part, share, parts, merge) -> None:
        """As `_send`, into the shared memory of the first thread block of the group's cluster."""
        first = lax.axis_index("neighbour") * self.tiles.splits
        exchange.send(len(part.out))(*part.out, part.weight, parts, merge, share - 1, first)

    def _receive_remotely(self, parts, merge) -> list[_Part]:
        exchange.wait(merge)
        pieces, heads = len(self.problem.row_pieces), self.problem.heads
        found = [
            [exchange.receive(sender, pieces, heads, piece)(parts) for piece in range(pieces + 1)]
            for sender in range(self.tiles.shares - 1)
        ]
        return [_Part(tuple(out), weight) for *out, weight in found]

    def _write(self, work: _Work, out, out_g, o_s) -> None:
        for piece, first in zip(out, self.problem.row_pieces, strict=True):
            turned = plgpu.layout_cast(piece.astype(self.dtype), TURNED)
            _store_plainly(o_s.at[:, pl.ds(first, WIDE)].T, turned)
        plgpu.commit_smem()
        pl.when(work.present)(lambda: self._copy_out(o_s, out_g.at[work.row, work.group]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _merged(parts: Sequence[_Part]) -> tuple[jax.Array, ...]:
    """The softmax over the positions of all parts."""
    peak = functools.reduce(jnp.maximum, (part.weight for part in parts))
    weights = [jnp.exp2(part.weight - peak) for part in parts]
    share = 1.0 / functools.reduce(jnp.add, weights)
    weights = [weight * share for weight in weights]
    weighted = [
        tuple(piece * _down(w, WIDE) for piece in part.out) for part, w in zip(parts, weights, strict=True)
    ]
    return tuple(functools.reduce(jnp.add, pieces) for pieces in zip(*weighted, strict=True))


class _Reduce:
    """Sum or maximum over the rows of a [rows, heads] array, in the calling warpgroup's own scratch memory.

    Mosaic's own reductions share theirs among the warpgroups of a thread block, which here run on their own.
    """

    def __init__(self, scratch: Any):
        self.scratch = scratch

    def __call__(self, array: jax.Array, op: str) -> jax.Array:
        if self.scratch is None:
            return array.sum(axis=0) if op == "add" else array.max(axis=0)
        shape: Any = plgpu.ShapeDtypeStruct((array.shape[1],), jnp.float32, layout=PER_HEAD)
        inline: Any = plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()), return_type=shape)
        return inline(lambda _, values, scratch: values.reduce(op, 0, scratch))(array, self.scratch)


def _down(per_head: jax.Array, rows: int) -> jax.Array:
    """[heads] repeated over `rows` rows."""
    return lax.broadcast_in_dim(per_head, (rows, per_head.shape[0]), [1])


def _store_plainly(ref: Any, array: jax.Array) -> None:
    """Stores to memory whose layout has no conflict-free way; JAX 0.12 wants that said, 0.11 can't be told."""
    store: Any = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = array
    else:
        store(ref, array, optimized=False)
