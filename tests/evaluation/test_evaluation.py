"""Perplexity and agreement: against numpy, between the two modes, at density 1.0, and what they refuse."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polarjax.errors import InputError, SparsityError
from polarjax.evaluation import agreement, perplexity, scoring
from polarjax.evaluation.text_perplexity import Perplexity
from polarjax.generation.generate import generate
from polarjax.model.decoder import Decoder, forward
from polarjax.selection.plans import SparsityPlan, uniform_groups
from polarjax.selection.routers import init_routers
from polarjax.selection.selectors import Oracle, Random, Sparsity
from tests.model import zoo
from tests.tolerances import assert_close

CONFIG = dataclasses.replace(
    zoo.CONFIGS["opt"],
    vocab_size=50,
    d_model=16,
    d_ff=24,
    max_positions=32,
    qkv_bias=False,
    out_bias=False,
    position_offset=0,
)
MODEL = Decoder(CONFIG, rngs=nnx.Rngs(0))
WINDOWS = np.random.default_rng(0).integers(0, 50, (5, 12), dtype=np.int32)
ROUTERS = init_routers(CONFIG, jax.random.key(1))
FULL = Sparsity(ROUTERS, SparsityPlan((24, 24), uniform_groups(CONFIG, 1.0, dense_layers=())))
HALF = Sparsity(ROUTERS, SparsityPlan((8, 16), uniform_groups(CONFIG, 0.5)))


_forward = zoo.jit(forward)


def logits_of(sparsity=None) -> np.ndarray:
    """Of `WINDOWS`, in float64."""
    lengths = np.full(len(WINDOWS), WINDOWS.shape[1], np.int32)
    return np.asarray(_forward(MODEL, WINDOWS, lengths, sparsity=sparsity)[0], np.float64)


def numpy_nll(sparsity=None, first=1) -> np.ndarray:
    logits = logits_of(sparsity)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows, columns = np.indices(WINDOWS.shape)
    chosen = probabilities[rows[:, first:], columns[:, first:] - 1, WINDOWS[:, first:]]
    return -np.log(chosen)


@pytest.mark.parametrize(
    ("mode", "batch_size", "context"),
    [("masked", 2, 0), ("decode", 5, 0)],  # with a context: the next test
)
def test_dense_perplexity_is_that_of_numpy(mode, batch_size, context):
    expected = numpy_nll(first=max(context, 1))
    result = perplexity(MODEL, WINDOWS, mode=mode, batch_size=batch_size, context=context)
    assert_close(result.token_nll, expected, "rounding")
    assert result.tokens == expected.size
    assert result.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-5)
    assert result.bits_per_byte(100) == pytest.approx(expected.sum() / math.log(2) / 100, rel=1e-5)


@pytest.mark.parametrize("mode", ["masked", "decode"])
def test_only_tokens_of_the_mask_are_scored(mode):
    scored = np.random.default_rng(1).random(WINDOWS.shape) < 0.7
    options = {"mode": mode, "batch_size": 5, "context": 5}
    counted, expected = scored[:, 5:], numpy_nll(first=5)
    dense = perplexity(MODEL, WINDOWS, scored=scored, **options)
    assert dense.tokens == counted.sum() < counted.size
    assert dense.nll == pytest.approx(expected[counted].mean(), rel=1e-5)
    assert_close(dense.token_nll[counted], expected[counted], "rounding")
    assert np.isnan(dense.token_nll[~counted]).all()
    pieces = [agreement(MODEL, WINDOWS, HALF, scored=each, **options) for each in (scored, ~scored, None)]
    assert pieces[0].tokens + pieces[1].tokens == pieces[2].tokens == counted.size
    for name in ("top1", "kl"):
        parts = sum(getattr(each, name) * each.tokens for each in pieces[:2])
        assert parts == pytest.approx(getattr(pieces[2], name) * counted.size, rel=1e-5)


@pytest.mark.parametrize(
    ("nll", "expected"), [(709.0, math.exp(709)), (711.0, math.inf), (math.inf, math.inf)]
)
def test_the_perplexity_of_a_very_bad_model_is_a_number(nll, expected):
    result = Perplexity(nll=nll, tokens=3, token_nll=np.full((1, 3), nll, np.float32))
    assert result.perplexity == result.to_json()["perplexity"] == expected


def test_there_are_no_bits_for_each_of_no_bytes():
    assert math.isnan(perplexity(MODEL, WINDOWS).bits_per_byte(0))


def test_masked_sparse_perplexity_is_that_of_forward():
    result = perplexity(MODEL, WINDOWS, sparsity=HALF, mode="masked")
    assert_close(result.token_nll, numpy_nll(HALF), "rounding")
    assert result.nll != pytest.approx(numpy_nll().mean(), abs=1e-3)


def test_modes_agree_only_at_batch_1():
    masked = perplexity(MODEL, WINDOWS, sparsity=HALF, mode="masked")
    alone = perplexity(MODEL, WINDOWS, sparsity=HALF, mode="decode", batch_size=1)
    together = perplexity(MODEL, WINDOWS, sparsity=HALF, mode="decode", batch_size=5)
    assert_close(alone.token_nll, masked.token_nll, "rounding")
    assert abs(together.token_nll - masked.token_nll).max() > 1e-3


def test_context_is_read_densely_in_decode():
    sparse = perplexity(MODEL, WINDOWS, sparsity=HALF, mode="decode", context=5)
    dense = perplexity(MODEL, WINDOWS, context=5)
    assert_close(sparse.token_nll[:, 0], dense.token_nll[:, 0], "rounding")  # the prefill predicts it
    assert abs(sparse.token_nll[:, 1:] - dense.token_nll[:, 1:]).max() > 1e-3


def test_decode_scores_what_generation_draws():
    prompts, lengths = WINDOWS[:, :4], jnp.full(5, 4, jnp.int32)
    drawn = np.asarray(generate(MODEL, prompts, lengths, max_new_tokens=6, sparsity=HALF).tokens)
    text = np.concatenate([prompts, drawn], 1)
    scored = perplexity(MODEL, text, sparsity=HALF, mode="decode", batch_size=5, context=4)
    alternatives = [
        perplexity(
            MODEL, np.where(np.arange(10) == 9, other, text), sparsity=HALF, mode="decode", context=4
        ).token_nll[:, -1]
        for other in range(50)
    ]
    assert_close(scored.token_nll[:, -1], np.min(alternatives, 0), "rounding")


@pytest.mark.parametrize("mode", ["masked", "decode"])
def test_full_density_agrees_and_half_does_not(mode):
    full = agreement(MODEL, WINDOWS, FULL, mode=mode, batch_size=5)
    half = agreement(MODEL, WINDOWS, HALF, mode=mode, batch_size=5)
    assert (full.top1, full.tokens) == (1.0, 5 * 11)
    assert abs(full.kl) < 1e-6
    assert half.top1 < 1.0
    assert half.kl > 1e-3


def test_kl_is_that_of_numpy():
    logits = [logits_of(sparsity)[:, :-1] for sparsity in (None, HALF)]
    p, q = (np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in logits)
    result = agreement(MODEL, WINDOWS, HALF)
    assert result.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)
    assert result.top1 == (p.argmax(-1) == q.argmax(-1)).mean()


def test_one_trace_for_all_batches_of_a_size():
    before = scoring._masked._cache_size()
    many = np.tile(WINDOWS[:, :7], (4, 1))
    perplexity(MODEL, many, sparsity=HALF, batch_size=5)
    perplexity(
        MODEL, many, sparsity=Sparsity(init_routers(CONFIG, jax.random.key(2)), HALF.plan), batch_size=5
    )
    assert scoring._masked._cache_size() == before + 1


@pytest.mark.parametrize("selector", [Oracle(), Random(jax.random.key(0))])
def test_selectors_for_studies_mask_but_do_not_decode(selector):
    sparsity = Sparsity(selector, SparsityPlan((None, None), (None, 2)))
    assert math.isfinite(perplexity(MODEL, WINDOWS, sparsity=sparsity).perplexity)
    with pytest.raises(SparsityError, match="cannot skip work"):
        perplexity(MODEL, WINDOWS, sparsity=sparsity, mode="decode")


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        (WINDOWS, {"mode": "fast"}, "no such mode; got 'fast'"),
        (WINDOWS, {"batch_size": 0}, "batch_size is not usable; got 0"),
        (WINDOWS, {"context": 12}, "no token is left to score; got 12, expected 0 to 11"),
        (WINDOWS, {"context": 11, "mode": "decode"}, "got 11, expected 0 to 10"),
        (WINDOWS, {"context": -1}, "no token is left to score; got -1"),
        (WINDOWS[:, :1], {}, "nothing to score"),
        (WINDOWS[:0], {}, "nothing to score"),
        (np.zeros((1, 33), np.int32), {}, "got 33 tokens, expected at most 32"),
        (
            WINDOWS,
            {"scored": np.ones((5, 11), bool)},
            r"scored: unusable mask .* bool \(5, 11\), expected bool",
        ),
        (WINDOWS, {"scored": np.ones((5, 12))}, "unusable mask of scored tokens; got float64"),
        (
            WINDOWS,
            {"scored": np.arange(12)[None] < [[5]] * 5, "context": 5},
            "got 25 scored tokens, none after",
        ),
        (WINDOWS + 40, {}, "outside the vocabulary"),
        (WINDOWS - 40, {}, "outside the vocabulary"),
    ],
)
def test_refusals(windows, options, message):
    with pytest.raises(InputError, match=message):
        perplexity(MODEL, windows, **options)


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(SparsityError, match="another number of layers"):
        perplexity(MODEL, WINDOWS, sparsity=Sparsity(ROUTERS, SparsityPlan((None,), (None,))))


def test_a_model_that_computes_nan_is_refused():
    broken = jax.tree.map(lambda value: value * jnp.nan, MODEL)
    for measure in (lambda: perplexity(broken, WINDOWS), lambda: agreement(broken, WINDOWS, HALF)):
        with pytest.raises(InputError, match="the model computes NaN or infinity; got 55 of 55"):
            measure()
