"""The decoder against transformers' own torch models: logits and greedy tokens of ragged batches.

The tiny models' RoPE scaling begins to bend at 12 positions, their windows are 7 wide, and texts reach 66.
"""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from polarjax.selection.selectors import Static
from tests.convert import hf_models
from tests.covering import covering_pairs
from tests.model import zoo
from tests.tolerances import assert_close

LENGTHS = np.array([5, 1, 17, 30], np.int32)
NEW = 36
TEXT_LENGTHS = np.array([66, 1, 17, 40], np.int32)
FAMILY_HEADS_TIED = covering_pairs(
    hf_models.MATRIX, lambda name: (*name.removesuffix("-tied").rsplit("-", 1), name.endswith("-tied"))
)
NAMES = [name for name in hf_models.MODELS if name in FAMILY_HEADS_TIED or name not in hf_models.MATRIX]
DECODED = ("opt", "opt-350m", "prosparse", "llama3-gqa", "mistral-gqa", "qwen2-window", "qwen3-window")
"""One of each family; test_forward.py says of every kind of layer that prefill and decode_step equal forward."""
GENERATED = ("opt-350m", "qwen2-window")  # and another in tests/generation/test_generate_parity.py


@functools.cache
def both(name: str) -> tuple[torch.nn.Module, pj.Decoder]:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "hf"), Path(folder, "out")
        theirs = hf_models.save(name, source, shards=True)
        convert_checkpoint(source, out)
        return theirs, pj.load(out).model


@functools.cache
def texts() -> np.ndarray:
    tokens = np.random.default_rng(1).integers(3, hf_models.VOCAB, (len(TEXT_LENGTHS), TEXT_LENGTHS.max()))
    return tokens.astype(np.int32)


def prompts() -> np.ndarray:
    return texts()[:, : LENGTHS.max()]


def their_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens[None]).long()).logits[0].numpy()


_forward = zoo.jit(pj.forward)


@zoo.jit
def _greedy(model: pj.Decoder, sparsity: pj.Sparsity | None) -> tuple[jax.Array, jax.Array]:
    capacity = int(LENGTHS.max()) + NEW
    cache = pj.init_cache(model.config, batch_size=len(LENGTHS), capacity=capacity, dtype=model.dtype)
    first, cache = pj.prefill(model, jnp.asarray(prompts()), jnp.asarray(LENGTHS), cache)

    def step(carry, _):
        logits, cache = carry
        token = logits.argmax(-1).astype(jnp.int32)
        return pj.decode_step(model, token, cache, sparsity=sparsity), (token, logits)

    _, (tokens, logits) = jax.lax.scan(step, (first, cache), length=NEW)
    return tokens.T, logits.swapaxes(0, 1)


@functools.cache
def our_greedy(name: str) -> tuple[np.ndarray, np.ndarray]:
    """What a prefill and decode steps append to each prompt [B NEW], and the logits behind it [B NEW V]."""
    tokens, logits = _greedy(both(name)[1], None)
    return np.asarray(tokens), np.asarray(logits)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_ragged_batch(name):
    theirs, ours = both(name)
    logits, _ = _forward(ours, jnp.asarray(texts()), jnp.asarray(TEXT_LENGTHS))
    for row, length in enumerate(TEXT_LENGTHS):
        expected = their_logits(theirs, texts()[row, :length])
        assert_close(logits[row, :length], expected, "parity")


@pytest.mark.parametrize("name", DECODED)
def test_prefill_and_decoding_of_a_ragged_batch(name):
    """Each token is the one that transformers finds likeliest after ours so far, hence after its own."""
    theirs, _ = both(name)
    for row, length in enumerate(LENGTHS):
        tokens, logits = (each[row] for each in our_greedy(name))
        text = np.concatenate([prompts()[row, :length], tokens])
        expected = their_logits(theirs, text[:-1])[length - 1 :]
        assert_close(logits, expected, "parity")
        np.testing.assert_array_equal(tokens, expected.argmax(-1))


@pytest.mark.parametrize("name", DECODED)
def test_models_say_different_things(name):
    """Otherwise equal greedy tokens would prove little."""
    assert len(set(our_greedy(name)[0].ravel())) > 4


@pytest.mark.parametrize("name", GENERATED)
def test_generate_says_what_transformers_says(name):
    theirs, ours = both(name)
    done = pj.generate(ours, jnp.asarray(prompts()), jnp.asarray(LENGTHS), max_new_tokens=NEW)
    for row, length in enumerate(LENGTHS):
        prompt = torch.from_numpy(prompts()[row : row + 1, :length]).long()
        expected = theirs.generate(
            prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, use_cache=True
        )
        np.testing.assert_array_equal(done.tokens[row], expected[0, length:].numpy())


@pytest.mark.parametrize(("name", "bias"), [("opt", "fc1.bias"), ("llama-relu-biases", "mlp.gate_proj.bias")])
def test_skipping_silent_neurons_changes_nothing(name, bias):
    """ReLU, gated or not: with the upper half of the neurons silenced, keeping the lower is exact."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = hf_models.make(name)
        with torch.no_grad():
            for key, value in theirs.named_parameters():
                if key.endswith(bias):
                    value[20:] = -100.0
        theirs.save_pretrained(Path(folder, "hf"))
        convert_checkpoint(Path(folder, "hf"), Path(folder, "out"))
        ours = pj.load(Path(folder, "out")).model
    config = ours.config
    assert config.neuron_sparsity
    layers = config.num_layers
    scores = jnp.broadcast_to(jnp.arange(40.0, 0, -1)[None], (layers, 40))
    selector = Static(groups=jnp.zeros((layers, config.num_kv_heads)), neurons=scores)
    plan = pj.SparsityPlan(neurons=(20,) * layers, groups=(None,) * layers)
    tokens, logits = map(np.asarray, _greedy(ours, pj.Sparsity(selector, plan)))
    for row, length in enumerate(LENGTHS):
        text = np.concatenate([prompts()[row, :length], tokens[row]])
        assert_close(logits[row], their_logits(theirs, text[:-1])[length - 1 :], "parity")
