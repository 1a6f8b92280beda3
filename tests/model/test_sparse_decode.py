"""The gathered decode step against the masked forward pass, which is the oracle of accuracy."""

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.selection.selectors import Static
from tests.model import zoo
from tests.model.oracle import Oracle
from tests.tolerances import assert_close


def _decode_from_nothing(model, tokens, sparsity):
    """Logits [B T V] of feeding `tokens` [B T] one by one; every position is computed sparsely, as in forward."""
    cache, out = zoo.empty_cache(model, tokens.shape[0]), []
    for position in range(tokens.shape[1]):
        logits, cache = zoo.decode_step(model, tokens[:, position], cache, sparsity=sparsity)
        out.append(np.asarray(logits))
    return np.stack(out, 1)


def _check(model, tokens, sparsity):
    rows, width = tokens.shape
    lengths = jnp.full((rows,), width, jnp.int32)
    masked = np.asarray(zoo.forward(model, tokens, lengths, sparsity=sparsity)[0])[:, :width]
    assert_close(_decode_from_nothing(model, tokens, sparsity), masked, "rounding")
    dense = Oracle(model.config, zoo.parameters(model))(np.asarray(tokens[0]).tolist())
    assert abs(masked[0] - dense).max() > 0.05  # something was skipped


@pytest.mark.parametrize("name", ["opt", "llama-mqa", "fatrelu-gated", "window"])
def test_one_sequence_agrees_with_the_masked_forward(name):
    """At B = 1 the batch's neurons are the token's neurons, so routers select the same in both."""
    model, (tokens, _) = zoo.model(name), zoo.batch(rows=1)
    _check(model, tokens, pj.Sparsity(zoo.routers(name), zoo.half(model.config)))


@pytest.mark.parametrize("name", ["opt-350m", "qk-norm"])
def test_groups_of_each_sequence_agree_with_the_masked_forward(name):
    model, (tokens, _) = zoo.model(name), zoo.batch()
    plan = pj.SparsityPlan((None,) * model.config.num_layers, zoo.half(model.config).groups)
    _check(model, tokens, pj.Sparsity(zoo.routers(name), plan))


@pytest.mark.parametrize("name", ["opt-350m", "fatrelu-gated"])
def test_fixed_neurons_of_a_batch_agree_with_the_masked_forward(name):
    model, (tokens, _) = zoo.model(name), zoo.batch()
    _check(model, tokens, pj.Sparsity(zoo.static(name), zoo.half(model.config)))


def test_a_dense_layer_in_a_plan_is_computed_densely():
    """None in every place is the dense model, bit for bit, whatever the selector."""
    model, (tokens, _) = zoo.model("opt"), zoo.batch()
    plan = pj.SparsityPlan((None, None), (None, None))
    nonsense = Static(groups=jnp.full((2, 4), jnp.nan))
    assert (
        _decode_from_nothing(model, tokens[:, :2], pj.Sparsity(nonsense, plan))
        == _decode_from_nothing(model, tokens[:, :2], None)
    ).all()


def test_silent_neurons_cost_nothing():
    """A ReLU model whose selection covers every active neuron loses nothing by skipping the others."""
    name = "opt"
    flat_bias = jnp.where(jnp.arange(zoo.CONFIGS[name].d_ff) < 20, 0.0, -100.0)
    model = zoo.with_parameter(zoo.model(name), "layers.1.mlp.b_up", flat_bias)
    neurons = jnp.broadcast_to(-jnp.arange(40.0)[None], (2, 40))
    selector = Static(groups=jnp.zeros((2, 4)), neurons=100 + neurons)
    plan = pj.SparsityPlan((None, 20), (None, None))
    tokens = zoo.batch()[0][:, :4]
    assert_close(
        _decode_from_nothing(model, tokens, pj.Sparsity(selector, plan)),
        _decode_from_nothing(model, tokens, None),
        "rounding",
    )
