"""Log-likelihoods of continuations, and the options of a generation: what lm-evaluation-harness asks of a model."""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from polarjax.errors import InputError
from polarjax.evaluation import continuations
from polarjax.evaluation.continuations import rows_of, score_continuations
from polarjax.evaluation.harness_generation import generation_options
from polarjax.generation.sampling import Categorical, Greedy
from polarjax.generation.settings import GenerationSettings
from polarjax.model.cache import init_cache
from polarjax.model.decoder import decode_step, forward, prefill
from polarjax.selection.selectors import Sparsity
from tests.model import zoo
from tests.one_line import refuses
from tests.tolerances import assert_close

NAME = "opt"
MODEL = zoo.model(NAME)
SPARSE = Sparsity(zoo.routers(NAME), zoo.half(zoo.CONFIGS[NAME]))
FORWARD, PREFILL, STEP = zoo.jit(forward), zoo.jit(prefill), zoo.jit(decode_step)
DRAW = np.random.default_rng(0)


def ids(count: int) -> tuple[int, ...]:
    return tuple(DRAW.integers(0, zoo.VOCAB, count).tolist())


def scores(pairs, **options) -> list[tuple[float, bool]]:
    """In the order of the pairs."""
    found = dict(score_continuations(MODEL, pairs, **options))
    return [tuple(found[i]) for i in range(len(pairs))]


def logits_of(tokens: Sequence[int], sparsity=None) -> np.ndarray:
    """[T V], through one program for all lengths."""
    padded = jnp.asarray([[*tokens, *[0] * (zoo.POSITIONS - len(tokens))]], jnp.int32)
    logits = FORWARD(MODEL, padded, jnp.asarray([len(tokens)], jnp.int32), sparsity=sparsity)[0]
    return np.asarray(logits[0], np.float64)[: len(tokens)]


def generated(pair, sparsity: Sparsity) -> tuple[float, bool]:
    """One sequence alone: its context by `prefill`, its continuation by decoding steps."""
    context, continuation = pair
    context = [*context, *continuation][-(zoo.POSITIONS + 1) : -len(continuation)]
    cache = init_cache(MODEL.config, batch_size=1, capacity=zoo.POSITIONS)
    padded = jnp.asarray([[*context, *[0] * (zoo.POSITIONS - len(context))]], jnp.int32)
    logits, cache = PREFILL(MODEL, padded, jnp.asarray([len(context)], jnp.int32), cache)
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        row = np.asarray(logits[0], np.float64)
        total += row[token] - np.log(np.exp(row).sum())
        greedy &= bool(row.argmax() == token)
        if i < len(continuation) - 1:
            logits, cache = STEP(MODEL, jnp.asarray([token], jnp.int32), cache, sparsity=sparsity)
    return total, greedy


def expected(pair, *, sparsity=None, longest=zoo.POSITIONS) -> tuple[float, bool]:
    """One sequence alone, through the logits of every position in numpy."""
    context, continuation = pair
    tokens = [*context, *continuation][-(longest + 1) :]
    logits = logits_of(tokens[:-1], sparsity)[-len(continuation) :]
    chosen = logits[np.arange(len(continuation)), list(continuation)]
    nll = np.log(np.exp(logits).sum(-1)) - chosen
    return -nll.sum(), bool((logits.argmax(-1) == list(continuation)).all())


def likeliest(context: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What greedy decoding writes after the context."""
    made = list(context)
    for _ in range(count):
        made.append(int(logits_of(made)[-1].argmax()))
    return tuple(made[len(context) :])


SHARED = ids(7)


@functools.cache
def pairs_to_score() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Contexts and continuations of all lengths around the edges of buckets, rows and the window."""
    return [
        (ids(3), ids(2)),
        (ids(1), ids(1)),
        *[
            (SHARED, (token,)) for token in range(continuations.LAST_TOKENS + 2)
        ],  # more than a row has room for
        (SHARED[:3], (*SHARED[3:], 5)),  # the same input, a longer continuation
        (SHARED, likeliest(SHARED, 1)),
        (SHARED, likeliest(SHARED, 2)),
        (ids(2), ids(zoo.POSITIONS)),  # the longest continuation, whose context has lost a token
        (ids(zoo.POSITIONS + 9), ids(3)),
        (ids(15), ids(2)),  # 16 and 17 tokens: two programs
        (ids(15), ids(3)),
        (ids(1), ids(1)),
    ]


@pytest.mark.parametrize(("sparsity", "batch_size"), [(None, 2), (SPARSE, None)], ids=["dense", "sparse"])
def test_scores_are_those_of_each_sequence_alone(batch_size, sparsity):
    pairs = pairs_to_score()
    found = scores(pairs, sparsity=sparsity, batch_size=batch_size)
    wanted = [expected(each, sparsity=sparsity) for each in pairs]
    assert_close([value for value, _ in found], [value for value, _ in wanted], "rounding")
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert sparsity or sum(greedy for _, greedy in found) >= 2


def test_scores_after_a_dense_context_are_those_of_generation():
    pairs = pairs_to_score()
    found = scores(pairs, sparsity=SPARSE, mode="decode", batch_size=3)
    wanted = [generated(each, SPARSE) for each in pairs]
    assert_close([value for value, _ in found], [value for value, _ in wanted], "rounding")
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert scores(pairs, mode="decode") == scores(pairs)
    with refuses(InputError, "no such mode"):
        scores(pairs, mode="dense")


def test_a_shorter_window_cuts_the_oldest_tokens():
    pairs = [(ids(9), ids(4)), (ids(1), ids(3)), (ids(30), ids(8))]
    found = scores(pairs, max_length=8, batch_size=2)
    assert_close([value for value, _ in found], [expected(each, longest=8)[0] for each in pairs], "rounding")


def test_one_program_for_each_power_of_two():
    before = continuations._log_probabilities._cache_size()
    for seed in range(3):
        lengths = np.random.default_rng(seed).integers(1, zoo.POSITIONS, 40)
        scores([(ids(int(length)), ids(1)) for length in lengths], batch_size=3)
    assert (
        continuations._log_probabilities._cache_size() - before == 3
    )  # 16, 32 and 48, the model's positions


def test_equal_inputs_are_computed_once(monkeypatch):
    batches = []
    run = continuations._run
    monkeypatch.setattr(continuations, "_run", lambda *args: batches.append(len(args[1])) or run(*args))
    scores([(SHARED, (token,)) for token in range(8)] + [(SHARED[:2], (*SHARED[2:], 9))], batch_size=2)
    assert batches == [2]  # nine requests: eight in one row, one in another


@pytest.mark.parametrize(
    ("width", "vocabulary", "rows"), [(16, 100, 64), (128, 49_152, 32), (8192, 128_256, 1)]
)
def test_batches_are_as_large_as_their_logits_allow(width, vocabulary, rows):
    assert rows_of(width, vocabulary) == rows


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([((1,), (2,)), ((1,), ())], {}, "request 1: a continuation has no tokens"),
        ([((), (2,))], {}, "request 0: a context has no tokens"),
        ([((1,), (1,) * 5)], {"max_length": 4}, "longer than the window; got 5 tokens, expected at most 4"),
        ([((1,), (zoo.VOCAB,))], {}, "outside the vocabulary"),
        ([((1,), (2,)), ((1.5,), (2,))], {}, "request 1: not a context and a continuation"),
        ([(1, (2,))], {}, "not a context and a continuation"),
        ([((1,), "2")], {}, "not a context and a continuation"),
        ([((1,), (2,), (3,))], {}, "not a context and a continuation"),
        ([((1,), (2,))], {"max_length": zoo.POSITIONS + 1}, "max_length is not usable"),
        ([((1,), (2,))], {"batch_size": 0}, "batch_size is not usable"),
    ],
)
def test_refused(pairs, options, message):
    with refuses(InputError, message):
        scores(pairs, **options)


def test_nan_is_no_score():
    broken = zoo.with_rows(MODEL, "final_norm.bias", 0, np.nan)
    with pytest.raises(InputError, match="the model computes NaN"):
        list(score_continuations(broken, [((1,), (2,))], batch_size=2))


SETTINGS = GenerationSettings(stop_ids=(2,), stop_strings=("END",), repetition_penalty=1.5)


@pytest.mark.parametrize(
    ("asked", "settings", "wanted"),
    [
        ({}, SETTINGS, {"sampler": Greedy(), "stop_strings": ("\n", "END", "</s>"), "repetition_penalty": 1.5}),
        ({"repetition_penalty": 1.0, "num_beams": 1, "use_cache": True}, SETTINGS, {"repetition_penalty": 1.0}),
        ({"do_sample": True, "temperature": 0.5}, SETTINGS, {"sampler": Categorical(0.5, 50)}),  # as transformers
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, SETTINGS, {"sampler": Categorical(1.0, None, 0.9)}),
        (
            {"do_sample": False},
            dataclasses.replace(SETTINGS, do_sample=True, temperature=0.7),
            {"sampler": Greedy()},
        ),
    ],
)  # fmt: skip
def test_generation_options(asked, settings, wanted):
    asked = {"until": ["\n", "", "END"], "max_gen_toks": 5, **asked}
    made = generation_options(asked, settings, eos="</s>", room=9)
    assert (made.max_new_tokens, made.stop_ids) == (5, (2,))
    assert {key: getattr(made, key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 4}, "unsupported generation options; got num_beams 4"),
        ({"max_gen_toks": 9}, "max_gen_toks leaves no room for the context; got 9, expected 1 to 8"),
        ({"max_gen_toks": 0}, "no token is to be generated"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is out of range"),
        ({"until": [5]}, "unusable stop strings"),
    ],
)
def test_refused_generation_options(asked, message):
    asked = {"until": [], "max_gen_toks": 5, **asked}
    with refuses(InputError, message):
        generation_options(asked, SETTINGS, eos=None, room=9)
