"""The decoder against transformers' own torch models: logits and greedy tokens of ragged batches."""

import functools
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from tests.convert import hf_models
from tests.tolerances import assert_close

LENGTHS = np.array([5, 1, 17, 30], np.int32)
NEW = 36


@functools.cache
def both(name: str) -> tuple[torch.nn.Module, pj.Decoder]:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "hf"), Path(folder, "out")
        theirs = hf_models.save(name, source, shards=True)
        convert_checkpoint(source, out)
        return theirs, pj.load(out).model


@functools.cache
def prompts() -> np.ndarray:
    tokens = np.random.default_rng(1).integers(3, hf_models.VOCAB, (len(LENGTHS), LENGTHS.max()))
    return tokens.astype(np.int32)


def their_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens[None]).long()).logits[0].numpy()


@functools.cache
def our_greedy(name: str) -> np.ndarray:
    """The tokens that `generate` appends to each prompt, [B NEW]."""
    _, ours = both(name)
    done = pj.generate(ours, jnp.asarray(prompts()), jnp.asarray(LENGTHS), max_new_tokens=NEW)
    return np.asarray(done.tokens)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_logits_of_a_ragged_batch(name):
    theirs, ours = both(name)
    logits, _ = pj.forward(ours, jnp.asarray(prompts()), jnp.asarray(LENGTHS))
    for row, length in enumerate(LENGTHS):
        expected = their_logits(theirs, prompts()[row, :length])
        assert_close(logits[row, :length], expected, "parity")


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_greedy_tokens_of_a_ragged_batch(name):
    """Each token is the one that transformers finds likeliest after ours so far, hence after its own."""
    theirs, _ = both(name)
    for row, length in enumerate(LENGTHS):
        text = np.concatenate([prompts()[row, :length], our_greedy(name)[row]])
        expected = their_logits(theirs, text[:-1])[length - 1 :].argmax(-1)
        np.testing.assert_array_equal(our_greedy(name)[row], expected)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_models_say_different_things(name):
    """Otherwise equal greedy tokens would prove little."""
    assert len(set(our_greedy(name).ravel())) > 4
