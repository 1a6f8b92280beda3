"""Samplers: the limits in which they are greedy, the sets they must not leave, the distribution they draw from."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import polarjax as pj
from tests.one_line import refuses

KEY = jax.random.key(0)
ROWS, VOCAB = 6, 11


@functools.cache
def _compiled(sampler):
    return jax.jit(sampler)


@st.composite
def logits(draw) -> jax.Array:
    """[ROWS VOCAB], no two equal in a row, spread over a wide range."""
    seed, spread = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.1, 1.0, 30.0]))
    random = np.random.default_rng(seed)
    return jnp.asarray(
        random.permuted(np.linspace(-spread, spread, ROWS * VOCAB)).reshape(ROWS, VOCAB), jnp.float32
    )


GREEDY = [
    pj.Categorical(top_k=1),
    pj.Categorical(top_p=1e-6),
    pj.Categorical(temperature=1e-6),
    pj.Categorical(temperature=1e-30),
    pj.Categorical(temperature=1e6, top_k=1),
    pj.Categorical(top_k=5, top_p=1e-6),
    pj.Categorical(top_p=1e-38),  # float32 flushes the last five to 0
    pj.Categorical(temperature=1e-38),
    pj.Categorical(temperature=1e-38, top_k=1),
    pj.Categorical(temperature=1e-38, top_p=0.5),
    pj.Categorical(temperature=1e-320, top_k=3, top_p=1e-320),
]


def assert_greedy(drawn: jax.Array, logits: jax.Array) -> None:
    assert drawn.dtype == jnp.int32
    assert (np.asarray(drawn) == np.asarray(logits).argmax(-1)).all()


@pytest.mark.parametrize("sampler", GREEDY, ids=str)
@settings(max_examples=8)
@given(logits=logits(), seed=st.integers(0, 999))
def test_the_greedy_limits(sampler, logits, seed):
    assert_greedy(_compiled(sampler)(logits, jax.random.key(seed)), logits)


@pytest.mark.parametrize("sampler", GREEDY, ids=str)
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_the_greedy_limits_without_jit(sampler, spread):
    """Every call outside of `jax.jit` compiles its conditions again, so there are few."""
    logits = (
        np.random.default_rng(0).permuted(np.linspace(-spread, spread, ROWS * VOCAB)).reshape(ROWS, VOCAB)
    )
    logits = jnp.asarray(logits, jnp.float32)
    assert_greedy(sampler(logits, KEY), logits)


def test_greedy_takes_the_lower_id_on_a_tie_and_needs_no_key():
    assert pj.Greedy()(jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]


@given(logits=logits(), seed=st.integers(0, 999), k=st.sampled_from([1, 3, VOCAB, 5 * VOCAB]))
def test_top_k_never_draws_outside_the_k_most_likely(logits, seed, k):
    drawn = np.asarray(_compiled(pj.Categorical(top_k=k, temperature=3.0))(logits, jax.random.key(seed)))
    rank = (np.asarray(logits) > np.take_along_axis(np.asarray(logits), drawn[:, None], 1)).sum(1)
    assert (rank < k).all()


def _nucleus(row: np.ndarray, top_p: float) -> set[int]:
    """The smallest set of most likely tokens that holds `top_p` of the probability, counted in float64."""
    weights = np.exp(row.astype(np.float64) - row.max())
    total, kept = 0.0, set()
    for token in np.argsort(-weights):
        kept.add(int(token))
        total += weights[token] / weights.sum()
        if total >= top_p:
            break
    return kept


@given(logits=logits(), seed=st.integers(0, 999), top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999]))
def test_top_p_never_draws_outside_the_nucleus(logits, seed, top_p):
    drawn = _compiled(pj.Categorical(top_p=top_p))(logits, jax.random.key(seed))
    for row, token in zip(np.asarray(logits), drawn.tolist(), strict=True):
        assert token in _nucleus(row, top_p + 1e-5)


@pytest.mark.parametrize(
    ("sampler", "kept"),
    [
        (pj.Categorical(), {0, 1, 2, 3}),
        (pj.Categorical(top_k=2), {0, 1}),
        (pj.Categorical(top_k=4), {0, 1, 2, 3}),
        (pj.Categorical(top_p=0.45), {0, 1}),
        (pj.Categorical(top_p=0.75), {0, 1, 2}),
        (pj.Categorical(top_p=1.0), {0, 1, 2, 3}),
        (pj.Categorical(top_k=3, top_p=0.7), {0, 1}),
        (pj.Categorical(temperature=2.0), {0, 1, 2, 3}),
    ],
    ids=str,
)
def test_the_distribution_is_the_softmax_of_what_is_kept(sampler, kept):
    """Pearson's statistic of 20,000 draws stays below what chance exceeds once in 10^6 (3 degrees of freedom: 30.7).

    The weights are .4, .3, .2, .1; after top_k = 3 they are .44, .33, .22, so a nucleus of .7 needs two.
    """
    draws = 20_000
    weights = np.array([0.4, 0.3, 0.2, 0.1]) ** (1 / sampler.temperature)
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (draws, 4))
    counts = np.bincount(_compiled(sampler)(logits, KEY), minlength=4)
    inside = sorted(kept)
    assert counts.sum() == counts[inside].sum() == draws
    expected = draws * weights[inside] / weights[inside].sum()
    assert np.sum((counts[inside] - expected) ** 2 / expected) < 30.7


def test_a_high_temperature_forgets_the_logits():
    logits = jnp.broadcast_to(jnp.array([50.0, 0.0, -50.0, 20.0]), (20_000, 4))
    counts = np.bincount(_compiled(pj.Categorical(temperature=1e9))(logits, KEY), minlength=4)
    assert abs(counts - 5000).max() < 6 * np.sqrt(20_000 * 0.25 * 0.75)


@pytest.mark.parametrize(
    "sampler",
    [
        pj.Categorical(),
        pj.Categorical(top_k=3),
        pj.Categorical(top_k=2, top_p=0.99),
        pj.Categorical(temperature=1e38),  # float32 flushes its reciprocal to 0
        pj.Categorical(temperature=1e300),
    ],
    ids=str,
)
def test_a_token_of_no_probability_is_never_drawn(sampler):
    logits = jnp.broadcast_to(jnp.array([-jnp.inf, 0.0, 0.0]), (2000, 3))
    for draw in (sampler, _compiled(sampler)):
        assert set(np.asarray(draw(logits, KEY)).tolist()) == {1, 2}


@pytest.mark.parametrize("sampler", [pj.Categorical(), pj.Categorical(0.7, top_k=7, top_p=0.9)], ids=str)
def test_draws_are_a_function_of_the_key_and_the_row(sampler):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, VOCAB)), jnp.float32)
    drawn = sampler(logits, KEY)
    assert (drawn == sampler(logits, jax.random.key(0))).all()
    assert (drawn != sampler(logits, jax.random.key(1))).any()
    for rows in (1, 5, 63):
        assert (drawn[:rows] == sampler(logits[:rows], KEY)).all()
    same = jnp.broadcast_to(logits[:1], logits.shape)
    assert len(set(sampler(same, KEY).tolist())) > 1  # the rows don't share their luck


def test_samplers_are_hashable_values():
    assert pj.Categorical(0.5, top_k=3) == pj.Categorical(0.5, top_k=3)
    numpy = pj.Categorical(np.float32(0.5), top_k=np.int64(3), top_p=np.float64(0.25))
    assert numpy == pj.Categorical(0.5, top_k=3, top_p=0.25)
    assert [type(each) for each in (numpy.temperature, numpy.top_k, numpy.top_p)] == [float, int, float]
    assert len({pj.Greedy(), pj.Greedy(), pj.Categorical(), pj.Categorical(top_p=0.5)}) == 3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": 0.0}, "temperature.*got 0.0, expected above 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k.*at least 1"),
        ({"top_k": 2.0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": np.float32(3)}, "top_k.*got 3.0"),
        ({"top_k": np.True_}, "top_k.*got True"),
        ({"top_p": 0.0}, "top_p.*above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": 10**400}, "top_p.*got 1.{79}, expected"),
        ({"top_p": [0.5] * 999 + [1.5]}, "top_p.*got 1.5, expected above 0 and at most 1, for each row"),
        ({"top_k": ()}, r"top_k.*got \(\), expected"),
    ],
)
def test_refuses_values_out_of_range(values, named):
    with refuses(pj.InputError, named):
        pj.Categorical(**values)


def test_wants_a_key():
    with refuses(pj.InputError, "needs a random key"):
        pj.Categorical()(jnp.zeros((1, 3)), None)
