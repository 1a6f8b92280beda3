"""Norms, activations, the rotary embedding and its scalings against NumPy formulae written independently."""

import dataclasses
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given

import polarjax as pj
from polarjax.model import mlp
from polarjax.model.layers import Maker, Norm, add_bias, apply_rope, rope_frequencies, rope_rotation
from tests.model import oracle, zoo
from tests.tolerances import assert_close

ROPES = {
    "plain": pj.RopeConfig(theta=300.0),
    "linear": pj.RopeConfig(scaling="linear", factor=4.0),
    "llama3": pj.RopeConfig(
        theta=500_000.0, scaling="llama3", factor=8.0, original_max_positions=64, high_freq_factor=4.0
    ),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("width", [2, 10, 64])
def test_rotary_frequencies(kind, width):
    expected = oracle.frequencies(ROPES[kind], width)
    np.testing.assert_allclose(rope_frequencies(ROPES[kind], width), expected, rtol=1e-5)


def test_llama3_scaling_by_frequency_band():
    """All three cases occur in a head of width 64, and each does what the model card says."""
    rope = ROPES["llama3"]
    plain = rope.theta ** (-np.arange(0, 64, 2) / 64)
    turns = 64 * plain / (2 * math.pi)  # over the original context
    scaled = np.asarray(rope_frequencies(rope, 64))
    high, low = turns > 4, turns < 1
    assert 0 < high.sum() < 32
    assert 0 < low.sum() < 32
    np.testing.assert_allclose(scaled[high], plain[high], rtol=1e-6)
    np.testing.assert_allclose(scaled[low], plain[low] / 8, rtol=1e-6)
    band = ~high & ~low
    assert band.any()
    assert ((scaled < plain) & (scaled > plain / 8))[band].all()


def rotated(x, positions, rope):
    return apply_rope(x, rope_rotation(positions, rope, x.shape[-1]))


@pytest.mark.parametrize("kind", ROPES)
def test_rotation_is_multiplication_by_a_complex_number(kind):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, 2, 2, 8)).astype(np.float32)  # [B T K G H]
    positions = np.array([[0, 1, 2], [5, 40, 41]], np.int32)
    turned = np.asarray(rotated(jnp.asarray(x), jnp.asarray(positions), ROPES[kind]))
    for b, t, k, g in np.ndindex(2, 3, 2, 2):
        expected = oracle.rotate(x[b, t, k, g].astype(np.float64), int(positions[b, t]), ROPES[kind])
        np.testing.assert_allclose(turned[b, t, k, g], expected, atol=1e-5)


@given(shift=st.integers(0, 1000), distance=st.integers(0, 50), seed=st.integers(0, 99))
def test_scores_depend_on_the_distance_alone(shift, distance, seed):
    random = np.random.default_rng(seed)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
    at = lambda x, position: rotated(x, jnp.full((1, 1), position, jnp.int32), ROPES["plain"])
    here = jnp.vdot(at(q, distance), at(k, 0))
    there = jnp.vdot(at(q, shift + distance), at(k, shift))
    assert abs(float(here - there)) < 2e-3


@pytest.mark.parametrize("dtype", zoo.DTYPES)
def test_rotation_keeps_the_dtype_and_computes_in_float32(dtype):
    """At position 40,000 the angle itself has no digits left in bfloat16."""
    x = jnp.ones((1, 1, 1, 4), dtype)
    turned = rotated(x, jnp.full((1, 1), 40_000, jnp.int32), ROPES["plain"])
    assert turned.dtype == x.dtype
    assert_close(turned[0, 0, 0], oracle.rotate(np.ones(4), 40_000, ROPES["plain"]), "kernel", "bfloat16")


@pytest.mark.parametrize("dtype", zoo.DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind, bias, dtype):
    config = dataclasses.replace(zoo.CONFIGS["opt"], norm=kind, norm_bias=bias, norm_eps=1e-3)
    norm = Norm(config, Maker(nnx.Rngs(0), jnp.dtype(dtype)), width=24)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, 3, 24)) * 0.1 + 0.5, dtype)
    norm.scale[...] = jnp.asarray(random.normal(size=24), dtype)
    if norm.bias is not None:
        norm.bias[...] = jnp.asarray(random.normal(size=24), dtype)
    y = norm(x)
    assert y.dtype == x.dtype
    parameters = [None if p is None else np.asarray(p[...], np.float64) for p in (norm.scale, norm.bias)]
    for row in np.ndindex(2, 3):
        expected = oracle.normalise(np.asarray(x[row], np.float64), kind, 1e-3, *parameters)
        assert_close(y[row], expected, "kernel", dtype)
    assert (norm.bias is not None) == bias


def test_norms_do_not_overflow_where_float16_would():
    """The square of 1000 is beyond float16; the norm is taken in float32."""
    norm = Norm(zoo.CONFIGS["llama-mha"], Maker(nnx.Rngs(0), jnp.dtype("float16")), width=24)
    y = norm(jnp.full((1, 24), 1000.0, jnp.float16))
    assert_close(y, np.ones((1, 24)), "kernel", "float16")


def test_biases_are_added_over_the_trailing_axes():
    x = jnp.zeros((2, 3, 4, 5))
    bias = nnx.Param(jnp.arange(20.0).reshape(4, 5))
    assert (add_bias(x, bias) == bias[...][None, None]).all()
    assert add_bias(x, None) is x


@pytest.mark.parametrize(("kind", "threshold"), [("relu", 0.0), ("relu", 0.25), ("silu", 0.0), ("gelu", 0.0)])
def test_activations(kind, threshold):
    changes = {"activation": kind, "activation_threshold": threshold}
    config = dataclasses.replace(zoo.CONFIGS["opt"], **changes)
    x = np.linspace(-6, 6, 49)  # holds the threshold itself
    found = mlp.activate(jnp.asarray(x, jnp.float32), config)
    assert_close(found, oracle.activate(x, kind, threshold), "rounding")
    for at in (0.0, threshold):
        assert jnp.isfinite(jax.grad(lambda x: mlp.activate(x, config))(at))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_value_is_active_where_the_published_model_says_so(dtype):
    """ProSparse asks for `x >= 0.01` with 0.01 rounded to 16 bits, which is above 0.01. NaN and infinity included."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    config = dataclasses.replace(zoo.CONFIGS["opt"], activation_threshold=0.01)
    ours = mlp.active(jnp.asarray(every.view(torch.int16).numpy().view(jnp.dtype(dtype))), config)
    np.testing.assert_array_equal(ours, torch.ge(every, 0.01).numpy())
