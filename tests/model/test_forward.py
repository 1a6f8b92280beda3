"""Forward against a decoder written differently, and prefill and decode_step against forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.model.parameters import parameters
from polarjax.model.taps import TapSpec, unpack
from tests.model import zoo
from tests.model.oracle import Oracle
from tests.tolerances import assert_close

NEW = zoo.WIDTH - 9


@functools.cache
def _computed(name: str):
    """Logits, taps and, for every row, the oracle after its sequence."""
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    logits, taps = jax.device_get(zoo.forward(model, tokens, lengths))
    oracles = []
    for row, length in zip(np.asarray(tokens), np.asarray(lengths), strict=True):
        oracle = Oracle(model.config, parameters(model))
        oracles.append((int(length), oracle(row[:length].tolist()), oracle))
    return logits, taps, oracles


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_logits_equal_the_plain_decoders(name):
    logits, _, oracles = _computed(name)
    assert logits.dtype == jnp.float32
    for row, (length, expected, _) in enumerate(oracles):
        assert_close(logits[row, :length], expected, "rounding")


@pytest.mark.parametrize("name", ["opt-350m", "window"])
def test_optimized_programs_agree(name):
    """The one test here of programs as users compile them; conftest.py lowers the level for the others."""
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    logits, _ = jax.jit(pj.forward, compiler_options={"xla_backend_optimization_level": 3})(
        model, tokens, lengths
    )
    for row, (length, expected, _) in enumerate(_computed(name)[2]):
        assert_close(logits[row, :length], expected, "rounding")


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_taps_match_the_oracle(name):
    _, taps, oracles = _computed(name)
    F = zoo.CONFIGS[name].d_ff
    for row, (length, _, oracle) in enumerate(oracles):
        for layer in range(zoo.CONFIGS[name].num_layers):
            assert_close(taps.inputs[layer][row, :length], oracle.inputs[layer], "rounding")
            assert_close(taps.norms[layer][row, :length], oracle.norms[layer], "rounding")
            assert_close(taps.change[layer][row, :length], oracle.changes[layer], "rounding")
            assert (unpack(taps.activity[layer], F)[row, :length] == np.array(oracle.active[layer])).all()


def test_taps_keep_only_what_was_asked_for():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    plain, nothing = zoo.jit(pj.forward)(model, tokens, lengths)
    kept = TapSpec(inputs=False, norms=False, change=False)
    logits, taps = zoo.jit(functools.partial(pj.forward, taps=kept))(model, tokens, lengths)
    assert nothing is None
    assert taps is not None
    assert (taps.inputs, len(taps.activity), taps.norms, taps.change) == ((), 2, (), ())
    assert (taps.activity[0].shape, taps.activity[0].dtype) == ((3, 9, 5), jnp.uint8)
    assert (logits == plain).all()


NARROW = ("opt-350m", "fatrelu-gated", "qk-norm")  # every norm, position and activation that has a cast


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in zoo.CONFIGS), *((name, "bfloat16") for name in NARROW)],
)
def test_prefill_and_decode_steps_equal_forward(name, dtype):
    model, (tokens, lengths) = zoo.model(name, dtype), zoo.batch()
    rows = tokens.shape[0]
    new = jnp.asarray(np.random.default_rng(3).integers(0, zoo.VOCAB, (rows, NEW)), jnp.int32)
    whole = np.zeros((rows, zoo.WIDTH), np.int32)
    for row, length in enumerate(np.asarray(lengths)):
        whole[row, : length + NEW] = np.concatenate([tokens[row, :length], new[row]])
    expected = np.asarray(zoo.forward(model, jnp.asarray(whole), lengths + NEW)[0])
    lengths = np.asarray(lengths)

    logits, cache = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, rows))
    for step in range(NEW + 1):
        assert_close(logits, expected[np.arange(rows), lengths - 1 + step], "rounding", dtype)
        assert (np.asarray(cache.length) == lengths + step).all()
        if step < NEW:
            logits, cache = zoo.decode_step(model, new[:, step], cache)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in (*cache.k, *cache.v)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_decoding_from_nothing_equals_forward(name):
    """A decode_step on an empty cache is the first position."""
    model, (tokens, _) = zoo.model(name), zoo.batch()
    expected = np.asarray(zoo.forward(model, tokens, jnp.full((3,), 9, jnp.int32))[0])
    cache = zoo.empty_cache(model, 3)
    for position in range(3):
        logits, cache = zoo.decode_step(model, tokens[:, position], cache)
        assert_close(logits, expected[:, position], "rounding")


def test_a_full_cache_drops_new_keys_and_keeps_the_rest():
    """Rows that ran out of room must not disturb their own cache, nor the other rows."""
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    _, cache = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3, capacity=9))
    logits, after = zoo.decode_step(model, tokens[:, 8], cache)
    _, roomy = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3))
    expected, _ = zoo.decode_step(model, tokens[:, 8], roomy)
    assert_close(logits[1:], expected[1:], "rounding")
    assert all((a[0] == b[0]).all() for a, b in zip((*cache.k, *cache.v), (*after.k, *after.v), strict=True))
    assert jnp.isfinite(logits).all()


@pytest.mark.parametrize("name", ["opt", "window"])
def test_float16_reads_and_writes_what_float32_does(name):
    """The dtype of many published checkpoints; XLA's CPU backend can't do all of its products."""
    (tokens, lengths), wide = zoo.batch(), zoo.model(name)
    half = zoo.model(name, "float16")
    expected = np.asarray(zoo.forward(wide, tokens, lengths)[0])
    logits = np.asarray(zoo.forward(half, tokens, lengths)[0])
    for row, length in enumerate(np.asarray(lengths)):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=2e-2)
    done = pj.generate(half, tokens, lengths, max_new_tokens=3)
    assert done.lengths.tolist() == [3] * len(lengths)
