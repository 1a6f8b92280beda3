"""Reads prompts piece by piece into rows of a cache: later pieces attend to what earlier ones left there."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polarjax.configs import ModelConfig
from polarjax.model import attention, mlp, prompt_attention
from polarjax.model.blocks import logits, residual
from polarjax.model.cache import KVCache, write_chunk
from polarjax.model.chunk_attention import attend_to_cache
from polarjax.model.decoder import Decoder, Layer, prompt_start
from polarjax.model.layers import Rotation
from polarjax.model.layout import Layout
from polarjax.model.parallel import of_all_groups, of_all_shards, of_own_groups, own_layout, own_numbers
from polarjax.model.spread import spread_pieces, spread_prefill
from polarjax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """R pieces of prompts, each of up to T tokens; a row may have several, which follow each other.

    Attributes:
      tokens: right-padded, int32 [R T].
      counts: tokens of each piece, int32 [R].
      rows: the row of the cache that each piece belongs to, int32 [R]; B for none.
      start: position of each piece's first token, int32 [R]: tokens of the same prompt that come before it.
    """

    tokens: Int[Array, "R T"]
    counts: Int[Array, "R"]
    rows: Int[Array, "R"]
    start: Int[Array, "R"]


def read_pieces(
    model: Decoder, pieces: Pieces, cache: KVCache, *, all_begin: bool = False
) -> tuple[Float[Array, "R V"], KVCache]:
    """Appends pieces to their rows of the cache, densely; other rows stay as they are. Traceable.

    A piece that starts at 0 begins its row anew. Reading a prompt in pieces of any size is the same as `prefill`. On a
    mesh, the pieces are in as many equal blocks, in order, as its axis `data` has devices, which each read a block: its
    rows are among those of the device.

    Args:
      model: the decoder.
      pieces: what to read; nothing of it is checked.
      cache: of B rows, with all earlier pieces in it; donate it under `jax.jit`.
      all_begin: whether every piece is known to start at 0, which makes a smaller program.

    Returns:
      float32 logits [R V] after each piece's last token, and the cache.
    """
    if model.layout is None:
        return _read(model, pieces, cache, all_begin=all_begin)

    def run(model, pieces, cache):
        return _read(model, pieces, cache, all_begin=all_begin, whole=True)

    return spread_pieces(run, model, pieces, cache)


def _read(
    model: Decoder, pieces: Pieces, cache: KVCache, *, all_begin: bool, whole: bool = False
) -> tuple[Float[Array, "R V"], KVCache]:
    """`read_pieces` on one device, or one device's part of it. Rows are numbered among those of its data shard or, if
    `whole`, of all; then the logits are those of all pieces."""
    config, capacity = model.config, cache.capacity
    tokens, counts, start = pieces.tokens, pieces.counts, pieces.start
    rows, mine = own_numbers(pieces.rows, cache.k[0].shape[0], whole=whole)
    x, rotation = prompt_start(model, tokens, counts, start)
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(column < counts[:, None], column + start[:, None], capacity)
    run = functools.partial(_layer, config=config, all_begin=all_begin, layout=own_layout())
    place, pairs = _Place(rows, mine, positions, start, counts), []
    for i, layer in enumerate(model.layers):
        with jax.named_scope(f"layer_{i}"):
            x, pair = run(layer, x, (cache.k[i], cache.v[i]), rotation, place, window=config.window(i))
        # Without it, the keys and values of all layers are kept until the last one, and then written.
        x, pair = jax.lax.optimization_barrier((x, pair))
        pairs.append(pair)
    last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], 1)[:, 0]
    shard_rows, _ = own_numbers(pieces.rows, cache.length.shape[0], whole=whole, shard=True)
    k, v = zip(*pairs, strict=True)
    last = of_all_shards(last) if whole else last
    return logits(model, last), KVCache(k, v, _lengths(cache.length, pieces, shard_rows))


class _Place(NamedTuple):
    """Where pieces go: `own_numbers` of their rows, the position of each token (S for none), `start` and `counts`."""

    rows: Int[Array, "R"]
    mine: Bool[Array, "R"] | None
    positions: Int[Array, "R T"]
    start: Int[Array, "R"]
    counts: Int[Array, "R"]


# Jitted so that all layers share one trace: a server compiles two dozen programs of them before it begins.
@functools.partial(jax.jit, static_argnames=("config", "window", "all_begin", "layout"))
def _layer(
    layer: Layer,
    x: Float[Array, "R T D"],
    pair: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    rotation: Rotation | None,
    at: _Place,
    *,
    config: ModelConfig,
    window: int | None,
    all_begin: bool,
    layout: Layout | None,
):
    """A layer over pieces: the hidden state, and its keys and values with theirs; `layout`: what this is inside of."""
    del layout  # known; here so that no trace is shared with another one

    def attend(h):
        q, k, v = attention.project_qkv(layer.attn, h, rotation)
        write = lambda old, new: write_chunk(old, of_all_groups(new), at.rows, at.positions)
        written = write(pair[0], k), write(pair[1], v)
        among = lambda q, k, v, written: prompt_attention.attend(q, k, v, at.counts, window=window)

        def to_cache(q, k, v, written):
            where = (at.rows, at.start, at.counts)
            return of_own_groups(attend_to_cache(of_all_groups(q), written, *where, window=window), at.mine)

        if all_begin:
            heads = among(q, k, v, written)
        else:
            heads = jax.lax.cond(jnp.all(at.start == 0), among, to_cache, q, k, v, written)
        return attention.project_out(layer.attn, heads), written

    x, written = residual(layer.attn_norm, x, attend, config)
    feed = lambda y: (mlp.dense(layer.mlp, y, config).whole(), None)
    return residual(layer.mlp_norm, x, feed, config)[0], written


def _lengths(length: Int[Array, "B"], pieces: Pieces, rows: Int[Array, "R"]) -> Int[Array, "B"]:
    """Positions filled after the pieces."""
    begun = jnp.where(pieces.start == 0, rows, length.shape[0])
    length = length.at[begun].set(0, mode="drop")
    end = jnp.where(pieces.counts > 0, pieces.start + pieces.counts, 0)
    return length.at[rows].max(end, mode="drop")


def read_in_chunks(
    model: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache: KVCache, *, most: int
) -> tuple[Float[Array, "B V"], KVCache]:
    """`prefill` of an empty cache, at most `most` tokens at a time, which bounds the memory that it needs. Traceable."""
    if model.layout is None:
        return _read_in_chunks(model, tokens, lengths, cache, most=most, vocab=model.config.vocab_size)
    vocab = model.layout.local(model.config).vocab_size
    run = functools.partial(_read_in_chunks, most=most, vocab=vocab)
    return spread_prefill(run, model, tokens, lengths, cache)


def _read_in_chunks(
    model: Decoder, tokens, lengths, cache: KVCache, *, most: int, vocab: int
) -> tuple[Float[Array, "B V"], KVCache]:
    """`read_in_chunks` on one device, or one device's part of it, which has `vocab` tokens of the head."""
    B, T = tokens.shape
    width = min(T, most)
    rows, columns = max(1, most // width), -(-T // width)
    groups = -(-B // rows)
    tokens = jnp.pad(tokens, ((0, groups * rows - B), (0, columns * width - T)))
    lengths = jnp.pad(lengths, (0, groups * rows - B))

    def read(carry, i):
        found, cache = carry
        group, start = i // columns * rows, i % columns * width
        own = jax.lax.dynamic_slice_in_dim(lengths, group, rows)
        piece = Pieces(
            jax.lax.dynamic_slice(tokens, (group, start), (rows, width)),
            jnp.clip(own - start, 0, width),
            group + jnp.arange(rows, dtype=jnp.int32),
            jnp.full(rows, start, jnp.int32),
        )
        logits, cache = _read(model, piece, cache, all_begin=columns == 1)
        last = (own > start) & (own <= start + width)
        return (found.at[jnp.where(last, piece.rows, B)].set(logits, mode="drop"), cache), None

    begin = jnp.zeros((B, vocab), jnp.float32), cache
    steps = jnp.arange(groups * columns, dtype=jnp.int32)
    return jax.lax.scan(read, begin, steps)[0]
