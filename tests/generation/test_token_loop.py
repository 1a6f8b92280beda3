"""The token loop without a model: a script says what each row would draw, and Python what must come out."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import polarjax as pj
from polarjax.generation.batch import make_rules
from polarjax.generation.token_loop import CHUNK, decode_loop

ROWS, VOCAB = 4, 9
STOPS = (3, 7)
BOUNDARIES = (1, 2, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 1, 2 * CHUNK + 2)
LONGEST = 3 * CHUNK + 1


def _step(token, cache, live):
    """Logits of the script's next column. The cache is (script, fed tokens, steps so far)."""
    script, fed, steps = cache
    fed = jax.lax.dynamic_update_slice(fed, token[:, None], (0, steps))
    logits = jax.nn.one_hot(jax.lax.dynamic_index_in_dim(script, steps + 1, 1, keepdims=False), VOCAB)
    return logits, (script, fed, steps + 1)


GREEDY = pj.Greedy()


def _loop(step, first, cache, key=None, *, sampler=GREEDY, max_new_tokens, stop_ids=()):
    """A loop without a penalty, with as much room as is asked for."""
    rules = make_rules(key, sampler=sampler, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    seen = jnp.zeros((ROWS, VOCAB), bool)
    return decode_loop(step, first, cache, rules, seen, room=max_new_tokens)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))
def _run(script, *, max_new_tokens, stop_ids):
    cache = (script, jnp.full((ROWS, LONGEST), -1, jnp.int32), jnp.int32(0))
    first = jax.nn.one_hot(script[:, 0], VOCAB)
    generation, (_, fed, steps) = _loop(_step, first, cache, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
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
    flat = lambda token, cache, live: (jnp.zeros((ROWS, VOCAB)), cache)
    loop = functools.partial(_loop, flat, jnp.zeros((ROWS, VOCAB)), (), max_new_tokens=12)
    run = jax.jit(lambda key: loop(key, sampler=pj.Categorical())[0].tokens)
    one, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()
    assert all(len(set(row.tolist())) > 3 for row in one)
    assert all(len(set(column.tolist())) > 1 for column in one.T[:4])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_fault_19_logits_that_are_not_finite_end_their_row_alone(poison):
    """The row is marked, nothing is drawn from such logits, and the other rows go on."""
    bad = jnp.array([2, 0, CHUNK + 3, 99])  # the draw at which a row's logits break; 99: never

    def step(token, count, live):
        logits = jax.nn.one_hot(jnp.full((ROWS,), 5), VOCAB)
        return jnp.where((bad == count)[:, None], poison, logits), count + 1

    first = jnp.where((bad == 0)[:, None], poison, jax.nn.one_hot(jnp.full((ROWS,), 5), VOCAB))
    run = functools.partial(_loop, max_new_tokens=2 * CHUNK)
    result, _ = jax.jit(lambda: run(step, first, jnp.int32(1), None))()
    assert result.lengths.tolist() == [2, 0, CHUNK + 3, 2 * CHUNK]
    assert result.failed.tolist() == [True, True, True, False]
    assert not result.stopped.any()
    assert [(row > 0).sum() for row in np.asarray(result.tokens)] == result.lengths.tolist()


def test_logits_of_minus_infinity_beside_finite_ones_are_fine():
    logits = jnp.full((ROWS, VOCAB), -jnp.inf).at[:, 4].set(0.0)
    run = functools.partial(_loop, max_new_tokens=3)
    result, _ = jax.jit(lambda: run(lambda token, cache, live: (logits, cache), logits, (), None))()
    assert (np.asarray(result.tokens) == 4).all()
    assert not result.failed.any()


def test_a_loop_ends_when_every_row_has_stopped_or_failed():
    step = lambda token, count, live: (jnp.full((ROWS, VOCAB), jnp.nan), count + 1)
    first = jax.nn.one_hot(jnp.array([3, 1, 1, 1]), VOCAB)
    run = functools.partial(_loop, max_new_tokens=50, stop_ids=(3,))
    result, steps = jax.jit(lambda: run(step, first, jnp.int32(0), None))()
    assert steps == CHUNK
    assert result.stopped.tolist() == [True, False, False, False]
    assert result.failed.tolist() == [False, True, True, True]
