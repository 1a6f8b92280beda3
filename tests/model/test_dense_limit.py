"""Density 1.0, everything selected by index, is the dense model."""

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from tests.model import zoo
from tests.tolerances import TOLERANCES, assert_close

STEPS = 6


def _follow(model, sparsity, tokens: list | None):
    """Logits of the prompts and of `STEPS` steps [STEPS + 1, B, V], along `tokens` or greedily."""
    prompts, lengths = zoo.batch()
    logits, cache = zoo.prefill(model, prompts, lengths, zoo.empty_cache(model, 3))
    out = [np.asarray(logits)]
    for step in range(STEPS):
        token = out[-1].argmax(-1) if tokens is None else tokens[step]
        logits, cache = zoo.decode_step(model, jnp.asarray(token, jnp.int32), cache, sparsity=sparsity)
        out.append(np.asarray(logits))
    return np.stack(out)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in ("opt-350m", "llama-mqa", "qk-norm", "window")),
        *((name, "bfloat16") for name in ("opt", "fatrelu-gated")),
    ],
)
def test_decoding_with_everything_selected_is_dense(name, dtype):
    """Equal logits; the same choices, save where the dense model's two best are closer than rounding."""
    model = zoo.model(name, dtype)
    sparsity = pj.Sparsity(zoo.routers(name, dtype), zoo.everything(model.config))
    dense = _follow(model, None, None)
    sparse = _follow(model, sparsity, list(dense.argmax(-1)))
    assert_close(sparse, dense, "rounding", dtype)
    chosen = np.take_along_axis(dense, sparse.argmax(-1)[..., None], -1)[..., 0]
    assert (chosen >= dense.max(-1) - 2 * TOLERANCES["rounding", dtype].atol).all()
    if dtype == "float32":
        assert (sparse.argmax(-1) == dense.argmax(-1)).all()


@pytest.mark.parametrize("name", ["opt-350m", "fatrelu-gated"])
def test_masking_nothing_is_dense(name):
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    sparsity = pj.Sparsity(zoo.routers(name), zoo.everything(model.config))
    dense, _ = zoo.forward(model, tokens, lengths)
    masked, _ = zoo.forward(model, tokens, lengths, sparsity=sparsity)
    assert_close(masked, dense, "rounding")


def test_generation_with_everything_selected_is_dense(name="llama-gqa"):
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    sparsity = pj.Sparsity(zoo.routers(name), zoo.everything(model.config))
    dense = pj.generate(model, tokens, lengths, max_new_tokens=12)
    sparse = pj.generate(model, tokens, lengths, max_new_tokens=12, sparsity=sparsity)
    assert (np.asarray(dense.tokens) == sparse.tokens).all()
