"""Selection: which groups and neurons a score keeps, masked and by index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import polarjax as pj
from polarjax.selection.routers import Routers, init_routers
from polarjax.selection.selectors import Oracle, Random, Selector, Static, top_mask
from tests.one_line import refuses
from tests.sparsity.planted import CONFIG

L, D, F, K = CONFIG.num_layers, CONFIG.d_model, CONFIG.d_ff, CONFIG.num_kv_heads
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(5, D)), jnp.float32)
NORMS = jnp.asarray(RANDOM.uniform(size=(5, K)), jnp.float32)
ACTIVITY = jnp.asarray(RANDOM.normal(size=(5, F)), jnp.float32)


def drawn_routers() -> Routers:
    made = init_routers(CONFIG, jax.random.key(0), neurons=True)
    draw = lambda leaf: jnp.asarray(RANDOM.normal(size=leaf.shape), jnp.float32)
    return jax.tree.map(draw, made)


ROUTERS = drawn_routers()
STATIC = Static(jnp.asarray(RANDOM.uniform(size=(L, K))), jnp.asarray(RANDOM.uniform(size=(L, F))))
PLAN = pj.SparsityPlan((7, None, 20), (None, 2, 3))
SHAPES = ((1, 1), (3, 5), (2, 2, 6))  # few, as each is compiled for each k
mask_of = jax.jit(top_mask, static_argnums=1)
SCORES = hnp.arrays(np.float32, st.sampled_from(SHAPES), elements=st.integers(-2, 2))


@given(SCORES, st.data())
def test_the_mask_is_that_of_a_stable_sort(scores, data):
    k = data.draw(st.integers(1, scores.shape[-1]))
    order = np.argsort(-scores, axis=-1, kind="stable")
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, order[..., :k], True, axis=-1)
    np.testing.assert_array_equal(mask_of(scores, k), expected)


@pytest.mark.parametrize("selector", [ROUTERS, STATIC])
def test_groups_by_index_are_those_of_the_mask(selector):
    sparsity = pj.Sparsity(selector, PLAN)
    for layer, k in enumerate(PLAN.groups):
        index, mask = sparsity.group_index(layer, X, CONFIG), sparsity.group_mask(layer, X, NORMS)
        if k is None:
            assert index is None and mask is None
            continue
        assert index is not None and mask is not None and index.shape == (5, k)
        np.testing.assert_array_equal(index, [np.flatnonzero(row) for row in mask])


@pytest.mark.parametrize("selector", [ROUTERS, STATIC])
def test_neurons_of_one_token_are_those_of_the_mask(selector):
    sparsity = pj.Sparsity(selector, PLAN)
    for row in range(5):
        index = sparsity.neuron_index(0, X[row : row + 1], CONFIG)
        mask = sparsity.neuron_mask(0, X[row : row + 1], ACTIVITY[row : row + 1])
        assert index is not None and mask is not None
        np.testing.assert_array_equal(index, np.flatnonzero(mask[0]))
    assert sparsity.neuron_index(1, X, CONFIG) is None and sparsity.neuron_mask(1, X, ACTIVITY) is None


def test_shared_neurons_have_the_largest_sum():
    index = pj.Sparsity(ROUTERS, PLAN).neuron_index(0, X, CONFIG)
    total = np.asarray(ROUTERS.neuron_scores(0, X)).sum(0)
    np.testing.assert_array_equal(index, np.sort(np.argsort(-total, kind="stable")[:7]))


def test_the_oracle_keeps_the_largest_norms_and_outputs():
    oracle = pj.Sparsity(Oracle(), PLAN)
    np.testing.assert_array_equal(oracle.group_mask(1, X, NORMS), top_mask(NORMS, 2))
    np.testing.assert_array_equal(oracle.neuron_mask(0, X, ACTIVITY), top_mask(jnp.abs(ACTIVITY), 7))


def test_random_selection_depends_on_key_layer_and_token():
    masks = lambda key: np.stack(
        [np.asarray(pj.Sparsity(Random(jax.random.key(key)), PLAN).group_mask(i, X, NORMS)) for i in (1, 2)]
    )
    np.testing.assert_array_equal(masks(0), masks(0))
    assert (masks(0) != masks(1)).any()
    assert masks(0).sum(-1).tolist() == [[2] * 5, [3] * 5]
    assert len({row.tobytes() for row in masks(0)[0]}) > 1


@pytest.mark.parametrize("selector", [Oracle(), Random(jax.random.key(0))])
def test_selectors_for_studies_cannot_decode(selector):
    sparsity = pj.Sparsity(selector, PLAN)
    with refuses(pj.SparsityError, "cannot skip work"):
        sparsity.group_index(1, X, CONFIG)
    with refuses(pj.SparsityError, "cannot skip work"):
        sparsity.neuron_index(0, X, CONFIG)


def test_static_selectors_know_their_model_and_may_lack_neurons():
    STATIC.check(CONFIG)
    with refuses(pj.SparsityError, "groups are for another model"):
        Static(jnp.zeros((L, K + 1))).check(CONFIG)
    with refuses(pj.SparsityError, "neurons are for another model"):
        Static(STATIC.groups, jnp.zeros((L + 1, F))).check(CONFIG)
    with refuses(pj.SparsityError, "no neuron scores"):
        pj.Sparsity(Static(STATIC.groups), PLAN).neuron_index(0, X, CONFIG)


@pytest.mark.parametrize("selector", [ROUTERS, STATIC, Oracle(), Random(jax.random.key(0))])
def test_every_selector_is_a_pytree_of_the_protocol(selector):
    assert isinstance(selector, Selector)
    again = jax.jit(lambda each: each)(pj.Sparsity(selector, PLAN))
    assert type(again.routers) is type(selector) and again.plan == PLAN
