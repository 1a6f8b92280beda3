"""Routers: the scores of a layer from its attention input, and what fits a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.selection.routers import init_routers, router_rank
from tests.one_line import refuses
from tests.sparsity.planted import CONFIG
from tests.tolerances import assert_close

L, D, F, K = CONFIG.num_layers, CONFIG.d_model, CONFIG.d_ff, CONFIG.num_kv_heads


def drawn(dtype: str = "float32", width: int = 0):
    random = np.random.default_rng(3)
    made = init_routers(CONFIG, jax.random.key(0), width=width)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape) / 4, dtype), made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(D,), (1, D), (5, D), (2, 3, D)])
@pytest.mark.parametrize("width", [0, 6])
def test_scores_are_those_of_numpy(shape, width, dtype):
    routers = drawn(dtype, width)
    x = jnp.asarray(np.random.default_rng(4).normal(size=shape), dtype)
    layer, wide = routers.layers[1], np.asarray(x, np.float64)
    groups, neurons = routers.group_scores(1, x), routers.neuron_scores(1, x)
    assert groups.dtype == neurons.dtype == jnp.float32
    w_in, w_out, w_group, b_group = (
        np.asarray(leaf, np.float64) for leaf in (layer.w_in, layer.w_out, layer.w_group, layer.b_group)
    )
    expected = wide @ w_group + b_group
    if width:
        hidden = wide @ np.asarray(layer.group_in, np.float64)
        expected += hidden / (1 + np.exp(-hidden)) @ np.asarray(layer.group_out, np.float64)
    assert_close(groups, expected, "rounding", dtype)
    assert_close(neurons, np.log1p(np.exp(wide @ w_in @ w_out)), "rounding", dtype)


def test_neuron_scores_are_positive_and_ranked_as_the_logits():
    routers, x = drawn(), jnp.asarray(np.random.default_rng(5).normal(size=(1, D)), jnp.float32)
    scores = np.asarray(routers.neuron_scores(0, x))[0]
    layer = routers.layers[0]
    assert layer.w_in is not None and layer.w_out is not None
    assert (scores > 0).all()
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(np.asarray(x @ layer.w_in @ layer.w_out)[0]))


@pytest.mark.parametrize("width", [0, 6])
def test_untrained_routers(width):
    routers = init_routers(CONFIG, jax.random.key(0), width=width)
    routers.check(CONFIG)
    for router in routers.layers:
        assert router.w_in is not None and router.w_out is not None
        assert (router.w_in.shape, router.w_out.shape) == ((D, router_rank(CONFIG)), (router_rank(CONFIG), F))
        assert not router.group_scores(jnp.ones(D)).any()
    first, second = (router.w_in for router in routers.layers[:2])
    assert (np.asarray(first) != np.asarray(second)).all()


def test_the_rank_is_the_published_one_up_to_the_width():
    assert router_rank(CONFIG) == D
    assert router_rank(dataclasses.replace(CONFIG, d_model=4096)) == 1024
    layer = init_routers(CONFIG, jax.random.key(0), rank=5).layers[0]
    assert layer.w_in is not None and layer.w_in.shape == (D, 5)


def test_only_relu_models_have_neuron_routers():
    silu = dataclasses.replace(CONFIG, activation="silu")
    routers = init_routers(silu, jax.random.key(0))
    assert all(router.w_in is None and router.w_out is None for router in routers.layers)
    with refuses(pj.SparsityError, "layer 2 has no neuron router"):
        routers.neuron_scores(2, jnp.zeros((1, D)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_layers": L + 1}, rf"got {L} layers, expected {L + 1}"),
        ({"d_model": D + 4}, "layer 0 are for another model"),
        ({"d_ff": F + 1}, "layer 0 are for another model"),
        ({"num_heads": 8, "num_kv_heads": 8}, "layer 0 are for another model"),
    ],
)
def test_routers_of_another_model(changes, named):
    with refuses(pj.SparsityError, named):
        drawn().check(dataclasses.replace(CONFIG, **changes))
