"""The token loop without a model: a script says what each row would draw, and Python what must come out."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import polarjax as pj
from polarjax.generate import CHUNK, decode_loop

ROWS, VOCAB = 4, 9
STOPS = (3, 7)
BOUNDARIES = (1, 2, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 1, 2 * CHUNK + 2)
LONGEST = 3 * CHUNK + 1


def _step(token, cache):
    """Logits of the script's next column. The cache is (script, fed tokens, steps so far)."""
    script, fed, steps = cache
    fed = jax.lax.dynamic_update_slice(fed, token[:, None], (0, steps))
    logits = jax.nn.one_hot(jax.lax.dynamic_index_in_dim(script, steps + 1, 1, keepdims=False), VOCAB)
    return logits, (script, fed, steps + 1)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))
def _run(script, *, max_new_tokens, stop_ids):
    cache = (script, jnp.full((ROWS, LONGEST), -1, jnp.int32), jnp.int32(0))
    first = jax.nn.one_hot(script[:, 0], VOCAB)
    generation, (_, fed, steps) = decode_loop(
        _step, first, cache, None, sampler=pj.Greedy(), max_new_tokens=max_new_tokens, stop_ids=stop_ids
    )
    return generation, fed, steps


def _expected(row: list[int], max_new_tokens: int, stop_ids: tuple[int, ...]) -> tuple[list[int], bool]:
    taken = []
    for token in row[:max_new_tokens]:
        taken.append(token)
        if token in stop_ids:
            return taken, True
    return taken, False


def _check(script: np.ndarray, max_new_tokens: int, stop_ids: tuple[int, ...]) -> None:
    result, fed, steps = jax.device_get(
        _run(jnp.asarray(script), max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    )
    rows = [_expected(row.tolist(), max_new_tokens, stop_ids) for row in script]
    assert result.tokens.shape == (ROWS, max_new_tokens)
    assert (result.tokens.dtype, result.lengths.dtype, result.stopped.dtype) == (np.int32, np.int32, np.bool_)
    for row, (tokens, stopped) in enumerate(rows):
        length = len(tokens)
        assert result.tokens[row].tolist() == tokens + [0] * (max_new_tokens - length)
        assert (result.lengths[row], result.stopped[row]) == (length, stopped)
        assert fed[row, : min(length, steps)].tolist() == tokens[: min(length, steps)]
    needed = max(len(tokens) for tokens, _ in rows) - 1
    assert steps == -(-needed // CHUNK) * CHUNK  # whole chunks, and none after all rows have ended


@st.composite
def scripts(draw) -> np.ndarray:
    """What each row would draw; stop ids are rare in some scripts and common in others."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    script = random.choice([0, 1, 2, 4, 5, 6, 8], (ROWS, LONGEST + CHUNK))
    stops = random.random(script.shape) < draw(st.sampled_from([0.0, 0.02, 0.1, 0.5]))
    return np.where(stops, random.choice(STOPS, script.shape), script).astype(np.int32)


@pytest.mark.parametrize("max_new_tokens", BOUNDARIES)
@settings(max_examples=15)
@given(script=scripts())
def test_every_row_is_its_script_up_to_a_stop_id(script, max_new_tokens):
    _check(script, max_new_tokens, STOPS)


@pytest.mark.parametrize("stop_ids", [(), (3,), (3, 7)], ids=str)
def test_rows_stop_in_different_chunks(stop_ids):
    script = np.ones((ROWS, LONGEST + CHUNK), np.int32)
    script[0, 0], script[1, CHUNK], script[2, CHUNK + 1] = 3, 3, 7
    _check(script, 2 * CHUNK + 2, stop_ids)


@pytest.mark.parametrize("where", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_all_rows_stop_at_once(where):
    script = np.ones((ROWS, LONGEST + CHUNK), np.int32)
    script[:, where] = 3
    _check(script, 2 * CHUNK + 2, (3,))


def test_a_stop_id_as_the_last_token_counts_as_stopped():
    script = np.ones((ROWS, LONGEST + CHUNK), np.int32)
    script[:, CHUNK] = 3
    _check(script, CHUNK + 1, (3,))
    _check(script, CHUNK, (3,))


def test_the_loop_draws_with_a_new_key_each_step():
    """Flat logits: with one key for all steps each row would repeat itself."""
    flat = lambda token, cache: (jnp.zeros((ROWS, VOCAB)), cache)
    loop = functools.partial(decode_loop, flat, jnp.zeros((ROWS, VOCAB)), (), max_new_tokens=12, stop_ids=())
    run = jax.jit(lambda key: loop(key, sampler=pj.Categorical())[0].tokens)
    one, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()
    assert all(len(set(row.tolist())) > 3 for row in one)
    assert all(len(set(column.tolist())) > 1 for column in one.T[:4])
