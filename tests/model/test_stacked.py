"""A stacked decoder with traced counts equals the decoder; skipped groups are replaced by their means."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.model.attention import contributions
from polarjax.model.blocks import logits
from polarjax.model.parameters import parameters
from polarjax.model.stacked import StackedDecoder, hidden_states, stack_parameters, unstack_parameters
from polarjax.selection.masking import Gating, Masking, StackedRouters
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.selection.selectors import Oracle
from tests.model import zoo
from tests.tolerances import assert_close

B, T = 2, 9


def routers_with_means(name: str, importance="contributions") -> Routers:
    """Untrained routers with random scores and mean outputs."""
    config, made = zoo.CONFIGS[name], zoo.routers(name)
    keys = jax.random.split(jax.random.key(5), config.num_layers)
    mean = lambda key: 0.3 * jax.random.normal(key, (config.num_kv_heads, config.d_model))
    layers = tuple(
        dataclasses.replace(layer, mean=mean(key)) for layer, key in zip(made.layers, keys, strict=True)
    )
    return Routers(layers, importance=importance)


def _result(stacked: StackedDecoder, tokens, masking: Masking) -> jax.Array:
    return logits(stacked, hidden_states(stacked, tokens, masking=masking, remat=True)[0])


_logits = zoo.jit(_result)


def kept_plan(config: pj.ModelConfig, k: int) -> pj.SparsityPlan:
    return pj.SparsityPlan((None,) * config.num_layers, (None,) + (k,) * (config.num_layers - 1))


@pytest.mark.parametrize(
    ("name", "importance"), [("opt", "norms"), ("llama-mha", "contributions"), ("window", "contributions")]
)
def test_masked_stacked_and_decoded_logits_are_equal(name, importance):
    model = zoo.model(name)
    config, k = model.config, max(1, model.config.num_kv_heads // 2)
    routers = routers_with_means(name, importance)
    tokens = jax.random.randint(jax.random.key(1), (B, T), 3, config.vocab_size)
    sparsity = pj.Sparsity(routers, kept_plan(config, k))
    expected, _ = zoo.forward(model, tokens, jnp.full((B,), T, jnp.int32), sparsity=sparsity)
    stacked = StackedDecoder.of(config, stack_parameters(parameters(model)))
    counts = jnp.full((config.num_layers, B), k).at[0].set(config.num_kv_heads)
    masking = Masking(StackedRouters.of(routers), counts)
    assert_close(_logits(stacked, tokens, masking), expected[:, :T], "rounding")
    cache = zoo.empty_cache(model, B)
    for t in range(T):
        step, cache = zoo.decode_step(model, tokens[:, t], cache, sparsity=sparsity)
        assert_close(step, expected[:, t], "rounding")


def test_a_skipped_group_is_replaced_by_its_mean_and_that_is_its_contribution():
    model = zoo.model("llama-mha")
    layer = model.layers[0].attn
    heads = jax.random.normal(jax.random.key(0), (B, T, *layer.wo[...].shape[:3]))
    parts = jnp.einsum("btkgh,kghd->btkd", heads, layer.wo[...])
    mean = parts.mean((0, 1))
    assert_close(
        contributions(layer, heads, mean), jnp.linalg.norm(parts - mean[None, None], axis=-1), "rounding"
    )
    assert_close(contributions(layer, heads, None), jnp.linalg.norm(parts, axis=-1), "rounding")


def test_an_oracle_like_routers_has_their_means_and_importance():
    routers = routers_with_means("opt")
    oracle = Oracle.like(routers)
    assert oracle.importance == "contributions"
    np.testing.assert_array_equal(oracle.mean_output(1), routers.mean_output(1))


def test_stacked_parameters_come_apart_again():
    flat = parameters(zoo.model("opt"))
    again = unstack_parameters(stack_parameters(flat), 2)
    assert again.keys() == flat.keys()
    assert all(np.array_equal(again[name], flat[name]) for name in flat)


def test_a_gating_skips_what_its_masking_skips_and_only_its_routers_learn_from_it():
    model = zoo.model("llama-mha")
    config = model.config
    routers = StackedRouters.of(routers_with_means("llama-mha"))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 3, config.vocab_size)
    stacked = StackedDecoder.of(config, stack_parameters(parameters(model)))
    counts = jnp.asarray([[config.num_kv_heads] * B, [1, config.num_kv_heads]])

    @zoo.jit
    def gradients(stacked, routers):
        loss = lambda kind, *args: jnp.mean(jnp.square(_result(args[0], tokens, kind(args[1], counts))))
        one = lambda kind: jax.value_and_grad(functools.partial(loss, kind), (0, 1))(stacked, routers)
        return one(Gating), one(Masking)

    (found, (of_model, of_routers)), (expected, (of_masked, unmoved)) = gradients(stacked, routers)
    assert_close(found, expected, "rounding")
    jax.tree.map(lambda a, b: assert_close(a, b, "rounding"), of_model, of_masked)
    assert not np.any(unmoved.layers.w_group)
    assert not np.any(of_routers.layers.w_group[0]), "its first layer skips nothing"
    assert np.any(of_routers.layers.w_group[1])


def test_the_gradient_of_a_gating_moves_score_from_group_to_group():
    """As a central difference of the soft mask that its docstring describes, with as much kept as before."""
    D, K, count = 3, 6, 2
    keys = jax.random.split(jax.random.key(3), 3)
    scores, help_of = jax.random.normal(keys[0], (K,)), jax.random.normal(keys[1], (K,))
    router = LayerRouter(None, None, jnp.zeros((1, D, K)), scores[None])
    x, norms = jnp.zeros((1, 1, D)), jnp.ones((1, 1, K))

    def kept(bias):
        layers = dataclasses.replace(router, b_group=bias[None])
        return Gating(StackedRouters(layers), jnp.full((1, 1), count)).group_mask(0, x, norms)[0, 0]

    s = np.asarray(scores, np.float64)
    ordered = np.sort(s)[::-1]
    threshold = (ordered[count - 1] + ordered[count]) / 2
    soft = lambda s, at: 1 / (1 + np.exp(at - s))
    total = soft(s, threshold).sum()

    def balanced(s):
        low, high = -50.0, 50.0
        for _ in range(100):
            at = (low + high) / 2
            low, high = (at, high) if soft(s, at).sum() > total else (low, at)
        return soft(s, low) @ np.asarray(help_of, np.float64)

    got = jax.grad(lambda bias: kept(bias) @ help_of)(scores)
    steps = 1e-4 * np.eye(K)
    expected = [(balanced(s + step) - balanced(s - step)) / 2e-4 for step in steps]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert sorted(np.flatnonzero(kept(scores))) == sorted(np.argsort(-s)[:count])
