"""Prompts read in pieces: the same as in one go, whatever the pieces, the rows and their company."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.model import chunk_attention
from polarjax.model.chunks import Pieces, read_in_chunks, read_pieces
from tests.model import zoo
from tests.tolerances import assert_close

NEW = zoo.WIDTH - 9
SLOTS, COUNT, SIZE = 5, 3, 4
ROWS = (4, 0, 2)  # the rows of the cache that hold the prompts
read = zoo.jit(read_pieces)


def cut(lengths: np.ndarray, size: int) -> list[tuple[int, int, int]]:
    """(prompt, start, count) of every piece, the prompts taking turns."""
    rounds = range(0, int(lengths.max()), size)
    return [
        (i, at, min(size, int(n) - at)) for at in rounds for i, n in enumerate(lengths.tolist()) if at < n
    ]


def read_all(model, tokens, lengths, cache, size: int, calls: int):
    """Reads the prompts with `calls` pieces at a time; logits after each, and the cache."""
    tokens, found = np.asarray(tokens), {}
    pieces = cut(np.asarray(lengths), size)
    for first in range(0, len(pieces), calls):
        some = pieces[first : first + calls]
        given = np.zeros((COUNT, SIZE), np.int32)
        about = np.array([[0, SLOTS, 0]] * COUNT, np.int32)
        for r, (i, at, count) in enumerate(some):
            given[r, :count] = tokens[i, at : at + count]
            about[r] = count, ROWS[i], at
        logits, cache = read(model, Pieces(given, *about.T), cache)
        found |= {i: np.asarray(logits[r]) for r, (i, *_) in enumerate(some)}
    return np.stack([found[i] for i in range(len(ROWS))]), cache


# What differs between pieces and whole prompts: positions, heads and windows; test_forward.py has the rest of the zoo.
NAMES = ("opt", "opt-350m", "llama-gqa", "llama-mqa", "qk-norm", "window")


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in NAMES), ("window", "bfloat16")])
def test_pieces_and_decode_steps_equal_forward(name, dtype):
    """Every size of pieces, alone and beside pieces of other prompts and of the same one."""
    model, (tokens, lengths) = zoo.model(name, dtype), zoo.batch()
    new = jnp.asarray(np.random.default_rng(3).integers(0, zoo.VOCAB, (3, NEW)), jnp.int32)
    lengths = np.asarray(lengths)
    whole = np.zeros((3, zoo.WIDTH), np.int32)
    for row, length in enumerate(lengths):
        whole[row, : length + NEW] = np.concatenate([tokens[row, :length], new[row]])
    expected = np.asarray(zoo.forward(model, jnp.asarray(whole), lengths + NEW)[0])
    poison = lambda leaf: jnp.full_like(leaf, jnp.nan if leaf.ndim > 1 else 7)
    for size, calls in ((1, 3), (3, 1), (4, 2), (4, 3)):
        cache = jax.tree.map(poison, zoo.empty_cache(model, SLOTS, capacity=16))
        logits, cache = read_all(model, tokens, lengths, cache, size, calls)
        assert_close(logits, expected[np.arange(3), lengths - 1], "rounding", dtype)
        assert cache.length[np.array(ROWS)].tolist() == lengths.tolist()
        assert cache.length[np.array([1, 3])].tolist() == [7, 7], "other rows stay as they are"
    live = jnp.isin(jnp.arange(SLOTS), jnp.array(ROWS))
    for step in range(NEW):
        token = jnp.zeros(SLOTS, jnp.int32).at[jnp.array(ROWS)].set(new[:, step])
        logits, cache = step_of(model, token, cache, live)
        at = np.asarray(logits)[np.array(ROWS)]
        assert_close(at, expected[np.arange(3), lengths + step], "rounding", dtype)
    assert np.isnan(np.asarray(cache.k[0], np.float32)[[1, 3]]).all(), "rows not in use are not written"
    assert cache.length[np.array([1, 3])].tolist() == [7, 7]


step_of = zoo.jit(lambda model, token, cache, live: pj.decode_step(model, token, cache, live=live))


def test_blocks_of_keys_add_up(monkeypatch):
    """A cache of several blocks, the last of which overlaps the one before."""
    model, (tokens, lengths) = zoo.model("window"), zoo.batch()
    expected, _ = read_all(model, tokens, lengths, zoo.empty_cache(model, SLOTS, capacity=16), 4, 3)
    monkeypatch.setattr(chunk_attention, "KEY_BLOCK", 3)
    monkeypatch.setitem(globals(), "read", zoo.jit(lambda *given: read_pieces(*given)))  # traced again
    made, _ = read_all(model, tokens, lengths, zoo.empty_cache(model, SLOTS, capacity=16), 4, 3)
    assert_close(made, expected, "rounding")


@pytest.mark.parametrize("most", [4, 20])
def test_a_batch_in_chunks_is_its_prefill(most):
    """Chunks of a part of one row, and of two rows where there are three."""
    model, (tokens, lengths) = zoo.model("window"), zoo.batch()
    expected, full = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3))
    made, cache = zoo.jit(functools.partial(read_in_chunks, most=most))(
        model, tokens, lengths, zoo.empty_cache(model, 3)
    )
    assert_close(made, expected, "rounding")
    assert cache.length.tolist() == lengths.tolist()
    for got, want in zip((*cache.k, *cache.v), (*full.k, *full.v), strict=True):
        for row, length in enumerate(lengths.tolist()):
            assert_close(got[row, :, :length], want[row, :, :length], "rounding")


def test_a_donated_cache_is_written_in_place():
    model = zoo.model("llama-gqa")
    cache = zoo.empty_cache(model, SLOTS, capacity=16)
    pieces = Pieces(jnp.zeros((COUNT, SIZE), jnp.int32), *jnp.zeros((3, COUNT), jnp.int32))
    compiled = jax.jit(read_pieces, donate_argnames="cache").lower(model, pieces, cache).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in (*cache.k, *cache.v))
