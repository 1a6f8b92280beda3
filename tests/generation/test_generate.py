"""Generation with a model: against a loop of decode_step, at the edges of what fits, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.generation import generate as generate_module
from polarjax.generation.batch import SMALLEST_BUCKET, bucket_length
from polarjax.model.parameters import with_parameters
from polarjax.selection.routers import Routers
from polarjax.selection.selectors import Oracle, Random
from tests.model import zoo
from tests.one_line import refuses

KEY = jax.random.key(0)


def _stepwise(name: str, count: int) -> np.ndarray:
    """Greedy tokens [B count] by prefill and single steps."""
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    logits, cache = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3))
    out = [np.asarray(logits).argmax(-1)]
    for _ in range(count - 1):
        logits, cache = zoo.decode_step(model, jnp.asarray(out[-1], jnp.int32), cache)
        out.append(np.asarray(logits).argmax(-1))
    return np.stack(out, 1)


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
def test_greedy_generation_is_a_loop_of_single_steps(name):
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    expected = _stepwise(name, 12)
    result = pj.generate(model, tokens, lengths, max_new_tokens=12)
    assert (np.asarray(result.tokens) == expected).all()
    assert result.lengths.tolist() == [12] * 3
    assert not result.stopped.any()


def test_a_large_batch_is_read_in_chunks(monkeypatch):
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    expected = pj.generate(model, tokens, lengths, max_new_tokens=5).tokens
    monkeypatch.setattr(generate_module, "READ_TOKENS", 8)
    generate_module.read_prompts.clear_cache()
    assert (pj.generate(model, tokens, lengths, max_new_tokens=5).tokens == expected).all()
    generate_module.read_prompts.clear_cache()


def test_stop_id_ends_the_row():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    free = _stepwise("opt", 12)
    stop_ids = (int(free[0, 3]), int(free[2, 0]))
    result = pj.generate(model, tokens, lengths, max_new_tokens=12, stop_ids=stop_ids)
    for row in range(3):
        hits = np.flatnonzero(np.isin(free[row], stop_ids))
        length = int(hits[0]) + 1 if len(hits) else 12
        assert result.tokens[row].tolist() == free[row, :length].tolist() + [0] * (12 - length)
        assert (int(result.lengths[row]), bool(result.stopped[row])) == (length, bool(len(hits)))
    assert int(result.lengths[2]) == 1


def test_the_last_position_can_be_reached(positions=16):
    """Prompt and answer fill the model's positions exactly, here a multiple of the chunk and the cache's 8."""
    config = dataclasses.replace(zoo.CONFIGS["llama-gqa"], max_positions=positions)
    model = with_parameters(config, zoo.parameters(zoo.model("llama-gqa")))
    tokens, lengths = zoo.batch()
    new = positions - tokens.shape[1]
    result = pj.generate(model, tokens, lengths, max_new_tokens=new)
    assert (np.asarray(result.tokens) == _stepwise("llama-gqa", new)).all()


def _half(name: str) -> pj.Sparsity:
    return pj.Sparsity(zoo.routers(name), zoo.half(zoo.CONFIGS[name]))


@pytest.mark.parametrize(("name", "sparse"), [("opt", True), ("window", False)])
def test_a_token_follows_the_last_position(name, sparse):
    """The last token takes no position: what is written is what a model of more positions writes."""
    large, (tokens, lengths) = zoo.model(name), zoo.batch()
    small = zoo.shortened(name, tokens.shape[1] + 9)
    settings = {"max_new_tokens": 10, "sparsity": _half(name) if sparse else None}
    expected = pj.generate(large, tokens, lengths, **settings).tokens
    assert (pj.generate(small, tokens, lengths, **settings).tokens == expected).all()
    if sparse:
        pieces = [piece.tokens for piece in pj.stream(small, tokens, lengths, **settings)]
        assert (np.concatenate(pieces, 1) == expected).all()
    with refuses(pj.InputError, r"exceed.*9 prompt tokens \+ 11 new.*at most 18 before the last one"):
        pj.generate(small, tokens, lengths, max_new_tokens=11)


def test_a_full_context_gives_the_token_that_forward_predicts(name="opt"):
    tokens, lengths = zoo.batch()
    model = zoo.shortened(name, tokens.shape[1])
    logits = np.asarray(zoo.forward(zoo.model(name), tokens, lengths)[0])
    expected = logits[np.arange(3), np.asarray(lengths) - 1].argmax(-1)
    for made in (
        pj.generate(model, tokens, lengths, max_new_tokens=1),
        pj.generate(
            model, tokens, lengths, max_new_tokens=1, sparsity=_half(name)
        ),  # prompts are read densely
        *pj.stream(model, tokens, lengths, max_new_tokens=1),
    ):
        assert made.tokens[:, 0].tolist() == expected.tolist()
        assert made.lengths.tolist() == [1] * 3


def test_numbers_of_numpy_are_numbers():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    settings = {"max_new_tokens": 10, "num_return_sequences": 3, "stop_ids": (5, 7)}
    sampler = pj.Categorical(temperature=0.5, top_k=3, top_p=0.5)
    expected = pj.generate(model, tokens, lengths, KEY, sampler=sampler, **settings).tokens
    settings = {
        "max_new_tokens": np.int64(10),
        "num_return_sequences": np.int32(3),
        "stop_ids": np.array([5, 7]),
    }
    sampler = pj.Categorical(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float16(0.5))
    assert (pj.generate(model, tokens, lengths, KEY, sampler=sampler, **settings).tokens == expected).all()
    settings["stop_ids"] = jnp.array([5, 7])
    pieces = [piece.tokens for piece in pj.stream(model, tokens, lengths, KEY, sampler=sampler, **settings)]
    assert (np.concatenate(pieces, 1) == expected).all()


def test_sampling_is_reproducible_per_row():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    settings = {"max_new_tokens": 10, "sampler": pj.Categorical(1.3, top_k=20, top_p=0.95)}
    together = pj.generate(model, tokens, lengths, KEY, **settings).tokens
    assert (together == pj.generate(model, tokens, lengths, KEY, **settings).tokens).all()
    assert (together != pj.generate(model, tokens, lengths, jax.random.key(1), **settings).tokens).any()
    first = pj.generate(model, tokens[:1], lengths[:1], KEY, **settings).tokens
    assert (together[:1] == first).all()


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_a_raw_key_is_one_of_the_kind_that_jax_uses(kind):
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    draw = lambda key: (
        pj.generate(model, tokens, lengths, key, sampler=pj.Categorical(), max_new_tokens=3).tokens
    )
    raw = {each: jax.random.PRNGKey(0, impl=each) for each in ("threefry2x32", "rbg")}
    with jax.default_prng_impl(kind):
        np.testing.assert_array_equal(draw(raw.pop(kind)), draw(jax.random.key(0)))
        with refuses(pj.InputError, "key: not a random key; got uint32"):
            draw(*raw.values())


def test_several_sequences_of_each_prompt():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    sampler = pj.Categorical(1.5, top_k=50, top_p=0.99)
    settings = {"max_new_tokens": 10, "sampler": sampler, "stop_ids": (5, 7)}
    many = pj.generate(model, tokens, lengths, KEY, num_return_sequences=3, **settings)
    repeated = np.repeat(np.asarray(tokens), 3, 0), np.repeat(np.asarray(lengths), 3)
    same = pj.generate(model, *map(jnp.asarray, repeated), KEY, **settings)
    assert (many.tokens == same.tokens).all()
    rows = np.asarray(many.tokens).reshape(3, 3, 10)
    assert all(len({tuple(each) for each in row.tolist()}) == 3 for row in rows)


def test_a_model_with_nan_says_so():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    broken = zoo.with_rows(model, "final_norm.bias", 0, np.nan)
    result = pj.generate(broken, tokens, lengths, max_new_tokens=10)
    assert result.failed.all()
    assert result.lengths.tolist() == [0, 0, 0]


def test_top_k_of_one_generates_greedily():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    sampler = pj.Categorical(temperature=0.8, top_k=1)
    result = pj.generate(model, tokens, lengths, KEY, max_new_tokens=12, sampler=sampler)
    assert (np.asarray(result.tokens) == _stepwise("opt", 12)).all()


def test_numpy_prompts_and_what_lies_beyond_them():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    beyond = np.arange(9)[None] >= np.asarray(lengths)[:, None]
    padded = np.where(beyond, -100, np.asarray(tokens))
    result = pj.generate(model, padded.astype(np.int64), np.asarray(lengths), max_new_tokens=12)
    assert (np.asarray(result.tokens) == _stepwise("opt", 12)).all()


def test_buckets_are_powers_of_two_within_the_models_positions():
    assert [bucket_length(length, 1000) for length in (1, 16, 17, 32, 33, 513)] == [16, 16, 32, 32, 64, 1000]
    assert bucket_length(3, 10) == 10
    assert bucket_length(12, 10) == 12  # padding may be wider than any sequence
    assert all(bucket_length(length, 2048) >= max(length, SMALLEST_BUCKET) for length in range(1, 2049))


def _prompts(tokens, lengths):
    return {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray(lengths)}


SHORT = zoo.POSITIONS - 5
BAD_PROMPTS = {
    "too long with what is to come": (
        _prompts(np.ones((2, SHORT), np.int32), np.array([3, SHORT])) | {"max_new_tokens": 7},
        rf"exceed.*{SHORT} prompt tokens \+ 7.*at most {zoo.POSITIONS}",
    ),
    "longer than the positions": (
        _prompts(np.ones((1, 60), np.int32), np.array([60])),
        rf"exceed.*at most {zoo.POSITIONS}",
    ),
    "id above the vocabulary": (
        _prompts(np.array([[1, 2], [zoo.VOCAB, 2]]), np.array([2, 2])),
        rf"row 1, token 0.*vocabulary.*got {zoo.VOCAB}, expected 0 to {zoo.VOCAB - 1}",
    ),
    "negative id": (_prompts(np.array([[1, -1]]), np.array([2])), "row 0, token 1.*vocabulary.*got -1"),
    "length 0": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 0])),
        "row 1.*length.*got 0, expected 1 to 4",
    ),
    "length above T": (_prompts(np.ones((2, 4), np.int32), np.array([5, 4])), "row 0.*length.*got 5"),
    "negative length": (_prompts(np.ones((2, 4), np.int32), np.array([4, -2])), "row 1.*length.*got -2"),
    "empty batch": (_prompts(np.ones((0, 4), np.int32), np.zeros((0,), np.int32)), r"shape.*tokens \[0, 4\]"),
    "no tokens": (_prompts(np.ones((2, 0), np.int32), np.zeros((2,), np.int32)), r"shape.*tokens \[2, 0\]"),
    "one axis": (_prompts(np.ones(4, np.int32), np.array([4])), r"shape.*tokens \[4\]"),
    "other lengths": (_prompts(np.ones((2, 4), np.int32), np.array([4])), r"shape.*lengths \[1\]"),
    "fractional ids": (_prompts(np.ones((2, 4)), np.array([4, 4])), "whole numbers.*float32"),
    "nothing to generate": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"max_new_tokens": 0},
        "max_new_tokens: nothing to generate; got 0",
    ),
    "half a token": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"max_new_tokens": 1.5},
        "max_new_tokens.*got 1.5",
    ),
    "true tokens": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"max_new_tokens": np.True_},
        "max_new_tokens.*got True",
    ),
    "a stop id beyond int32": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"stop_ids": (5, 2**31)},
        "stop_ids: not a token id; got 2147483648, expected whole numbers, 0 to 2147483647",
    ),
    "a stop id below 0": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"stop_ids": (np.int64(-1),)},
        "stop_ids: not a token id; got -1",
    ),
    "half a stop id": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"stop_ids": (1.5,)},
        "stop_ids: not a token id; got 1.5",
    ),
    "no sequences": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"num_return_sequences": 0},
        "num_return_sequences: no sequences; got 0",
    ),
    "greedy sequences": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"num_return_sequences": 2},
        "num_return_sequences: greedy.*all the same",
    ),
    "no key": (
        _prompts(np.ones((2, 4), np.int32), np.array([4, 4])) | {"sampler": pj.Categorical()},
        "needs a random key",
    ),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_refuses_prompts_it_cannot_continue(case):
    arguments, named = BAD_PROMPTS[case]
    with refuses(pj.InputError, named):
        pj.generate(zoo.model("opt"), **{"max_new_tokens": 4} | arguments)


PLAN = zoo.half(zoo.CONFIGS["opt"])
ROUTERS = zoo.routers("opt")
BAD_SPARSITY = {
    "plan of another depth": (
        pj.Sparsity(ROUTERS, pj.SparsityPlan((8,) * 3, (1,) * 3)),
        "got 3 layers, expected 2",
    ),
    "too many groups": (
        pj.Sparsity(ROUTERS, pj.SparsityPlan((8,) * 2, (None, 5))),
        "more groups than there are.*got 5, expected at most 4",
    ),
    "too many neurons": (
        pj.Sparsity(ROUTERS, pj.SparsityPlan((8, 41), (1,) * 2)),
        "more neurons than there are.*got 41, expected at most 40",
    ),
    "routers of another depth": (
        pj.Sparsity(Routers(ROUTERS.layers[:1]), PLAN),
        "routers are for another model; got 1 layers, expected 2",
    ),
    "routers of another width": (
        pj.Sparsity(zoo.routers("llama-gqa"), PLAN),
        "routers of layer 0.*another model",
    ),
    "oracle": (pj.Sparsity(Oracle(), PLAN), "decode_step: oracle selection.*forward"),
    "random": (pj.Sparsity(Random(KEY), PLAN), "decode_step: random selection.*forward"),
}


@pytest.mark.parametrize("case", BAD_SPARSITY)
def test_refuses_sparsity_that_does_not_fit(case):
    sparsity, named = BAD_SPARSITY[case]
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    with refuses(pj.SparsityError, named):
        pj.generate(model, tokens, lengths, max_new_tokens=2, sparsity=sparsity)
    with refuses(pj.SparsityError, named):
        pj.decode_step(model, tokens[:, 0], zoo.empty_cache(model, 3), sparsity=sparsity)


@pytest.mark.parametrize("case", sorted(set(BAD_SPARSITY) - {"oracle", "random"}))
def test_forward_refuses_sparsity_that_does_not_fit(case):
    sparsity, named = BAD_SPARSITY[case]
    with refuses(pj.SparsityError, named):
        pj.forward(zoo.model("opt"), *zoo.batch(), sparsity=sparsity)


@pytest.mark.parametrize(
    ("cache", "named"),
    [
        ({"name": "llama-gqa", "batch_size": 3}, r"cache is for another.*\[3 2 S 8\].*\[3 4 S 8\]"),
        ({"name": "opt", "batch_size": 2}, r"cache is for another.*\[2 4 S 8\].*\[3 4 S 8\]"),
        (
            {"name": "opt", "batch_size": 3, "capacity": 8},
            r"do not fit.*got 9 tokens.*capacity of 8.*init_cache",
        ),
    ],
)
def test_prefill_refuses_a_cache_that_does_not_fit(cache, named):
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    made = zoo.empty_cache(zoo.model(cache.pop("name")), **cache)
    with refuses(pj.InputError, named):
        pj.prefill(model, tokens, lengths, made)


@pytest.mark.parametrize("sizes", [(0, 8), (2, 0), (-1, 8), (2**31 - 1, 2**31 - 1)])
def test_a_cache_needs_room(sizes):
    with refuses(pj.InputError, "is not usable.*at least 1|no device could hold"):
        pj.init_cache(zoo.CONFIGS["opt"], batch_size=sizes[0], capacity=sizes[1])
