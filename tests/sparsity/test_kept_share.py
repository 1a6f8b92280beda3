"""The share of an MLP's output that selected neurons keep, and what a token's use of neurons is, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polarjax.model import mlp
from polarjax.sparsity.kept_share import importance, kept_share
from tests.model import zoo
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", ["opt", "llama-mha"])
def test_the_share_is_one_minus_what_is_missing(name):
    layer, random = zoo.model(name).layers[0].mlp, np.random.default_rng(0)
    down = np.asarray(layer.w_down[...], np.float64)
    hidden = random.normal(size=(3, len(down)))
    hidden[1] = 0  # a token without output loses nothing
    scores = random.normal(size=len(down)).astype(np.float32)
    best = np.argsort(-scores)
    expected = []
    for k in (1, 17, len(down)):
        missing = np.linalg.norm(hidden[:, best[k:]] @ down[best[k:]], axis=1)
        whole = np.linalg.norm(hidden @ down, axis=1)
        expected.append(np.mean([1, *(1 - missing[[0, 2]] / whole[[0, 2]])]))
    found = kept_share(
        layer, jnp.asarray(hidden, jnp.float32), jnp.asarray(scores), jnp.asarray([1, 17, len(down)])
    )
    assert_close(found, expected, "rounding")
    assert found[-1] == 1
    values = importance(layer, jnp.asarray(hidden, jnp.float32))
    assert_close(values, np.abs(hidden) * np.linalg.norm(down, axis=1)[None], "rounding")


def test_use_of_neurons_depends_on_their_number_alone():
    config = dataclasses.replace(zoo.CONFIGS["fatrelu-gated"], activation_threshold=0.0)
    F = config.d_ff
    pre = np.full((3, F), -2.0, np.float32)
    pre[0, :7], pre[1] = 5.0, 0.1
    active, l1 = mlp.usage(jnp.asarray(pre), config)
    assert_close(active, [7 / F, 1, 0], "rounding")
    assert_close(l1, [(7 / F) ** 0.5, 1, 0], "rounding")
    drawn = jax.random.normal(jax.random.key(0), (4, F))
    assert_close(mlp.usage(100 * drawn, config)[1], mlp.usage(drawn, config)[1], "rounding")
    slope = jax.grad(lambda x: jnp.sum(mlp.usage(x, config)[1]))(jnp.asarray(pre))
    assert np.isfinite(slope).all() and not slope[2].any()
