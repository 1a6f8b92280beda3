"""Taps: what a forward pass records, checked against the layer's own definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

import polarjax as pj
from polarjax.model.taps import TapSpec, pack, unpack
from tests.model import zoo
from tests.tolerances import assert_close


@given(hnp.arrays(bool, hnp.array_shapes(max_dims=3, max_side=20)))
def test_packing_and_back(activity):
    packed = pack(jnp.asarray(activity))
    assert packed.shape == (*activity.shape[:-1], -(-activity.shape[-1] // 8)) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, np.packbits(activity, axis=-1))
    np.testing.assert_array_equal(unpack(packed, activity.shape[-1]), activity)


@pytest.mark.parametrize("name", ["opt", "fatrelu-gated", "qk-norm"])
def test_activity_follows_from_the_inputs_of_the_mlp(name):
    """With the attention of a layer cut off, the MLP's input is its norm of the residual stream."""
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    for layer in range(model.config.num_layers):
        model = zoo.with_parameter(
            model, f"layers.{layer}.attn.wo", jnp.zeros_like(model.layers[layer].attn.wo[...])
        )
    _, taps = zoo.forward(model, tokens, lengths)
    x = model.embed(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape))
    first = model.layers[0]
    if first.attn.bo is not None:
        x = x + first.attn.bo[...][None, None]
    gate = first.mlp.w_up if first.mlp.w_gate is None else first.mlp.w_gate
    bias = first.mlp.b_up if first.mlp.w_gate is None else first.mlp.b_gate
    before = jnp.einsum("btd,fd->btf", first.mlp_norm(x), gate[...])
    before = before if bias is None else before + bias[...][None, None]
    before = before - model.config.activation_threshold
    active = unpack(taps.activity[0], model.config.d_ff)[:, : tokens.shape[1]]
    for row, length in enumerate(np.asarray(lengths)):
        clear = np.abs(before[row, :length]) > 1e-5
        np.testing.assert_array_equal(active[row, :length][clear], (before[row, :length] > 0)[clear])
        assert 0 < active[row, :length].mean() < 1


def test_router_inputs_are_the_normed_residual_stream():
    model, (tokens, lengths) = zoo.model("opt"), zoo.batch()
    _, taps = zoo.forward(model, tokens, lengths)
    x = model.embed(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape))
    expected = model.layers[0].attn_norm(x)
    for row, length in enumerate(np.asarray(lengths)):
        assert_close(taps.inputs[0][row, :length], expected[row, :length], "rounding")


def test_a_group_that_gives_nothing_has_norm_zero():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    wv = np.array(model.layers[1].attn.wv[...])
    wv[:, 1] = 0
    _, taps = zoo.forward(zoo.with_parameter(model, "layers.1.attn.wv", jnp.asarray(wv)), tokens, lengths)
    assert (np.asarray(taps.norms[1][0, :, 1]) == 0).all()
    assert (np.asarray(taps.norms[1][0, : tokens.shape[1], 0]) > 0).all()


TAPS = ("inputs", "activity", "norms", "change")


@pytest.mark.parametrize("kept", TAPS)
def test_only_what_is_asked_for_is_kept(kept):
    spec = TapSpec(**{name: name == kept for name in TAPS})
    model, batch = zoo.model("opt"), zoo.batch()
    _, taps = jax.eval_shape(functools.partial(pj.forward, taps=spec), model, *batch)
    assert taps is not None
    lengths = {name: len(getattr(taps, name)) for name in TAPS}
    assert lengths == {name: model.config.num_layers * (name == kept) for name in lengths}


def test_no_taps_by_default():
    assert jax.eval_shape(pj.forward, zoo.model("opt"), *zoo.batch())[1] is None
