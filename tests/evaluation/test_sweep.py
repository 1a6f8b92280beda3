"""The sweep: the same figures as perplexity and agreement, errors of differences, compilations, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polarjax.checkpoint.bundle import Bundle
from polarjax.errors import InputError, PolarjaxError
from polarjax.evaluation import GreedyOptions, agreement, paired, perplexity, scoring, static_selector, sweep
from polarjax.evaluation.estimates import Sums, Units, differences, ratio
from polarjax.evaluation.parting import parting
from polarjax.evaluation.pictures import draw
from polarjax.generation.generate import generate
from polarjax.model.decoder import forward
from polarjax.model.taps import TapSpec, unpack
from polarjax.selection.masking import Counted, top_counted
from polarjax.selection.routers import Routers, init_routers
from polarjax.selection.selectors import Oracle, Random, Sparsity, top_mask
from polarjax.text.token_windows import ScoredWindows
from tests.evaluation.test_evaluation import CONFIG, FULL, HALF, MODEL, ROUTERS, WINDOWS, _forward
from tests.tolerances import assert_close

SELECTORS = {"router": ROUTERS, "oracle": Oracle()}
OPTIONS = {"plan_of": lambda density, batch_size: HALF.plan, "densities": (0.5,), "batch_sizes": (5,)}


@pytest.fixture(scope="module")
def measured():
    """Both protocols and a mask of scored tokens, so that windows differ in what they count."""
    scored = np.random.default_rng(1).random(WINDOWS.shape) < 0.7
    sizes = np.where(scored, np.random.default_rng(2).integers(0, 5, WINDOWS.shape), 0)
    cut = ScoredWindows(WINDOWS, scored, sizes, np.minimum(sizes, 1), stride=12, bos=None)
    greedy = GreedyOptions(prompts=2, prompt_tokens=4, new_tokens=6)
    return cut, sweep(MODEL, cut, selectors=SELECTORS, greedy=greedy, seed=np.int32(0), **OPTIONS)


def test_a_row_is_what_perplexity_and_agreement_measure(measured):
    cut, report = measured
    labels = [row.label for row in report.rows]
    assert labels == ["router, masked", "oracle, masked", "router, decode at batch 5"]
    for row in report.rows:
        options = {"mode": row.protocol, "batch_size": 5, "context": 1, "scored": cut.scored}
        sparsity = Sparsity(SELECTORS[row.selector], HALF.plan)
        dense = perplexity(MODEL, WINDOWS, **options)
        sparse = perplexity(MODEL, WINDOWS, sparsity=sparsity, **options)
        compared = agreement(MODEL, WINDOWS, sparsity, **options)
        assert row.sparse["nll"].value == pytest.approx(sparse.nll, rel=1e-5)
        assert row.sparse["perplexity"]["token"].value == pytest.approx(sparse.perplexity, rel=1e-5)
        bits = sparse.bits_per_byte(cut.scored_bytes(1))
        assert row.sparse["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)
        increase = row.against_dense["increase"]["token"].value
        assert increase == pytest.approx(sparse.perplexity / dense.perplexity - 1, abs=1e-5)
        assert row.kl.value == pytest.approx(compared.kl, rel=1e-4)
        assert row.top1.value == pytest.approx(compared.top1)
        (alone,) = (each for each in report.dense if each["protocol"] == row.protocol)
        assert alone["nll"].value == pytest.approx(dense.nll, rel=1e-5)


def test_a_report_is_json_and_a_table(measured):
    cut, report = measured
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["text"]["scored_words"] == cut.num_words[:, 1:].sum()
    assert found["rows"][0]["plan"]["groups"] == list(HALF.plan.groups)
    assert {"weights", "routers"} <= set(found["model"])
    assert found["versions"]["jax"] == jax.__version__
    for columns in ("perplexity", "agreement"):
        assert report.table(columns).count("router") == 2
    assert "oracle needs what decoding skips" in report.table()


def test_greedy_texts_are_those_of_generate(measured):
    _, report = measured
    prompts, lengths = WINDOWS[:, :4], np.full(5, 4, np.int32)
    dense, sparse = (
        np.asarray(generate(MODEL, prompts, lengths, max_new_tokens=6, sparsity=each).tokens)
        for each in (None, HALF)
    )
    equal = np.cumprod(dense == sparse, 1).sum(1)
    found = report.rows[-1].greedy
    assert (found["median"], found["mean"].value) == (np.median(equal), pytest.approx(equal.mean()))
    assert (found["prompts"], found["most"]) == (5, 6)  # at least a batch
    assert [row.greedy for row in report.rows[:-1]] == [None, None]


def test_texts_that_never_part_are_censored():
    dense = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    found = parting(dense, np.array([[1, 2, 3], [9, 2, 3], [1, 9, 3]]))
    assert (found["median"], found["mean"].value, found["censored"]) == (1, pytest.approx(4 / 3), 1)


def test_errors_are_those_of_independent_windows():
    random = np.random.default_rng(0)
    dense, more = random.normal(50, 9, 40), random.normal(2, 1, 40)
    counts = np.full(40, 20)
    assert ratio(dense, counts).standard_error == pytest.approx((dense / 20).std(ddof=1) / np.sqrt(40))
    found = differences(Sums(dense, dense + more, more, more), Units(counts))
    paired_error = (more / 20).std(ddof=1) / np.sqrt(40)
    assert found["nll"].standard_error == pytest.approx(paired_error)
    assert found["increase"]["token"].standard_error == pytest.approx(np.exp(more.sum() / 800) * paired_error)
    drawn = random.integers(0, 40, (2000, 40))  # the bootstrap's spread of the difference of perplexities
    values = np.exp((dense + more)[drawn].mean(1) / 20) - np.exp(dense[drawn].mean(1) / 20)
    assert found["perplexity"].standard_error == pytest.approx(values.std(), rel=0.1)


@pytest.mark.parametrize(("sums", "counts"), [([3.0], [4]), ([3.0, 0.0], [4, 0])])
def test_a_single_window_has_no_error(sums, counts):
    found = ratio(np.array(sums), np.array(counts))
    assert found.to_json() == {"value": 0.75, "standard_error": None}


@pytest.mark.parametrize(("number", "size"), [(1, 1), (6, 4), (5, 5), (10, 4), (33, 8), (7, 2)])
def test_every_window_counts_once_and_batches_are_full(number, size):
    found = paired.batches(number, size)
    assert sorted(np.concatenate([index[:count] for index, count in found])) == list(range(number))
    assert all(len(set(index)) == size for index, _ in found)


def test_compilations_do_not_depend_on_windows_and_routers(monkeypatch):
    programs = (paired._dense_logits, paired._masked_pair, scoring.decoded)
    before = [each._cache_size() for each in programs]
    windows = np.tile(WINDOWS[:, :9], (3, 1))
    monkeypatch.setattr(paired, "LARGEST_MASKED_BATCH", 4)
    plans = {0.5: HALF.plan, 1.0: FULL.plan}
    options = {"plan_of": lambda density, _: plans[density], "densities": plans, "batch_sizes": (4,)}
    for seed in (1, 2):
        routers = init_routers(CONFIG, jax.random.key(seed))
        sweep(MODEL, windows, selectors={"router": routers, "oracle": Oracle()}, **options)
    after = [each._cache_size() for each in programs]
    assert np.subtract(after, before).tolist() == [1, 1, len(plans)]  # masked: one for all densities


def test_masks_with_traced_counts_are_those_of_the_plan():
    """Ties and missing numbers included."""
    scores = np.random.default_rng(0).integers(0, 4, (3, 5, 8)).astype(np.float32)
    scores[0, 0], scores[1, :, 2], scores[2, 0] = 0, np.nan, -np.inf
    run = jax.jit(top_counted)
    for k in range(1, 9):
        np.testing.assert_array_equal(run(scores, jnp.int32(k)), top_mask(scores, k))
    lengths = np.full(5, 12, np.int32)
    for plan in (HALF.plan, FULL.plan):
        counted = Counted.of(ROUTERS, plan, (HALF.plan, FULL.plan), CONFIG)
        masked = [
            _forward(MODEL, WINDOWS, lengths, sparsity=each)[0] for each in (counted, Sparsity(ROUTERS, plan))
        ]
        assert_close(*masked, "rounding")


def test_selectors_that_share_a_program_keep_their_means_and_importance():
    """Two that fill in means and rank by contributions, between two that do neither."""
    means = [np.full((CONFIG.num_kv_heads, CONFIG.d_model), value, np.float32) for value in (1, 2)]
    layers = [
        tuple(dataclasses.replace(layer, mean=jnp.asarray(mean)) for layer in ROUTERS.layers)
        for mean in means
    ]
    first, second = (Routers(each, importance="contributions") for each in layers)
    selectors = (ROUTERS, first, Oracle(), Oracle.like(second))
    lengths = np.full(5, 12, np.int32)
    for which, selector in enumerate(selectors):
        shared = paired.OneOf.of(selectors, which, CONFIG)
        assert len(shared.selectors) == 2
        masked = [
            _forward(MODEL, WINDOWS, lengths, sparsity=Sparsity(each, HALF.plan))
            for each in (shared, selector)
        ]
        assert_close(masked[0][0], masked[1][0], "rounding")


def test_static_scores_are_means_over_the_text(monkeypatch):
    monkeypatch.setattr(paired, "LARGEST_MASKED_BATCH", 3)  # the last batch is not full
    found = static_selector(MODEL, WINDOWS)
    _, taps = jax.jit(forward, static_argnames="taps")(
        MODEL, WINDOWS, np.full(5, 12, np.int32), taps=TapSpec()
    )
    assert taps is not None
    assert_close(found.groups, [np.mean(each, (0, 1)) for each in taps.norms], "rounding")
    active = [np.mean(unpack(each, CONFIG.d_ff), (0, 1)) for each in taps.activity]
    assert_close(found.neurons, active, "rounding")


def test_random_choices_differ_between_batches(monkeypatch):
    monkeypatch.setattr(paired, "LARGEST_MASKED_BATCH", 1)
    same = np.repeat(WINDOWS[:1], 3, 0)
    random = {"random": Random(jax.random.key(0))}
    report = sweep(MODEL, same, selectors=random, protocols=("masked",), **OPTIONS)
    assert report.rows[0].sparse["nll"].standard_error > 1e-3
    assert report.dense[0]["nll"].standard_error == pytest.approx(0, abs=1e-6)


def test_static_is_left_out_without_a_text_of_its_own():
    names = ("oracle", "static")
    report = sweep(MODEL, WINDOWS, selectors=names, neurons="dense", protocols=("masked",), densities=[0.5])
    assert [row.selector for row in report.rows] == ["oracle"]
    assert "--static-text" in report.notes[0]


def test_the_dense_model_alone():
    report = sweep(MODEL, WINDOWS, selectors=())
    assert report.rows == []
    assert report.dense[0]["nll"].value == pytest.approx(perplexity(MODEL, WINDOWS, context=1).nll, rel=1e-6)


def test_a_picture_shows_every_series(measured, tmp_path):
    with (tmp_path / "a.svg").open("wb") as stream:
        draw(measured[1], stream, ".svg")
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")


ORACLE = {"selectors": ("oracle",), "neurons": "dense", "densities": (0.5,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selectors": ("best",)}, "no such choice of selectors; got 'best', expected router, oracle"),
        ({"selectors": "oracle"}, r"selectors is not a sequence; got 'oracle'"),
        ({"selectors": {"a": 1}}, "not a selector; got int"),
        ({}, "the model has no routers yet"),
        ({"selectors": ("static",)}, "static needs scores from a text of its own"),
        (ORACLE | {"protocols": ("decode",)}, "no selector can decode; got oracle"),
        (ORACLE | {"protocols": ("fast",)}, "no such choice of protocols; got 'fast'"),
        (ORACLE | {"protocols": ()}, "no protocols given"),
        (ORACLE | {"densities": (0.5, 7)}, "not a density"),
        (ORACLE | {"densities": 0.5}, "densities is not a sequence"),
        (ORACLE | {"densities": ()}, "no density to measure"),
        (ORACLE | {"densities": (None,)}, "the model has no plans yet"),
        (ORACLE | {"neurons": "plan"}, "the model has no plans yet"),
        (ORACLE | {"neurons": "half"}, "no such choice of neurons; got 'half'"),
        (ORACLE | {"dense_layers": (2,)}, "no such layer; got 2, expected numbers from 0 to 1"),
        (ORACLE | {"context": 12}, "no token is left to score"),
        (ORACLE | {"seed": "a"}, "seed"),
        (ORACLE | {"plan_of": 3}, "plan_of: not a function; got 3"),
        (ORACLE | {"static": 3}, "static: not a Static; got 3"),
        (ORACLE | {"source": "m"}, "source: not a Mapping; got 'm'"),
        (OPTIONS | {"selectors": SELECTORS, "batch_sizes": (6,)}, "got batch size 6, 5 windows"),
        (OPTIONS | {"selectors": SELECTORS, "batch_sizes": ()}, "no batch size to decode at"),
        (OPTIONS | {"selectors": SELECTORS, "batch_sizes": (0,)}, "batch_sizes is not usable; got 0"),
        (
            OPTIONS | {"selectors": SELECTORS, "greedy": GreedyOptions(prompt_tokens=13)},
            "longer than the windows",
        ),
        (OPTIONS | {"selectors": SELECTORS, "greedy": GreedyOptions(prompt_tokens=9)}, "model's positions"),
        (OPTIONS | {"selectors": SELECTORS, "greedy": GreedyOptions(new_tokens=0)}, "new_tokens"),
    ],
)
def test_refusals_are_made_before_anything_runs(options, message, monkeypatch):
    monkeypatch.setattr(paired, "batches", None)
    with pytest.raises(PolarjaxError, match=message) as refused:
        sweep(MODEL, WINDOWS, **options)
    assert "Hint: " in str(refused.value)


def test_what_is_no_model_and_what_computes_nan_are_refused():
    with pytest.raises(InputError, match="not a Bundle"):
        sweep(ROUTERS, WINDOWS)
    broken = Bundle(jax.tree.map(lambda value: value * np.nan, MODEL))
    with pytest.raises(InputError, match="the model computes NaN"):
        sweep(broken, WINDOWS, **ORACLE)
