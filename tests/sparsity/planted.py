"""Activations whose records follow from the router inputs by a hidden linear map, and those that do not."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from polarjax.sparsity.activations import Activations
from tests.model import zoo

CONFIG = dataclasses.replace(
    zoo.CONFIGS["llama-mha"],
    vocab_size=32,
    num_layers=3,
    d_model=12,
    d_ff=21,
    head_dim=4,
    max_positions=16,
    activation="relu",
    gated_mlp=False,
    positions="learned",
    rope=None,
)


def activations(tokens: int = 2000, *, dtype: str = "float32", seed: int = 0) -> Activations:
    """A neuron is active where a hidden linear map exceeds .7, norms are exp of another: both can be learnt."""
    random = np.random.default_rng(seed)
    L, D, F, K = CONFIG.num_layers, CONFIG.d_model, CONFIG.d_ff, CONFIG.num_kv_heads
    inputs = random.normal(size=(L, tokens, D))
    inputs[..., 0] = 1.0  # lets a map without bias have a threshold
    neurons, groups = random.normal(size=(L, D, F)) * D**-0.5, random.normal(size=(L, D, K))
    active = np.einsum("lnd,ldf->lnf", inputs, neurons) > 0.7
    stored = jnp.asarray(inputs, dtype)
    return Activations(
        config=CONFIG,
        dtype=jnp.dtype(dtype),
        inputs=np.asarray(stored).view(np.uint16) if dtype == "bfloat16" else np.asarray(stored),
        activity=np.packbits(active, axis=-1),
        norms=np.exp(0.3 * np.einsum("lnd,ldk->lnk", inputs, groups)).astype(np.float32),
        part=random.choice(3, size=tokens, p=(0.8, 0.1, 0.1)).astype(np.uint8),
    )


def shuffled(planted: Activations, seed: int = 1) -> Activations:
    """The same records, but of other tokens: nothing can be learnt from the inputs."""
    order = np.random.default_rng(seed).permutation(planted.num_tokens)
    assert planted.activity is not None and planted.norms is not None
    return dataclasses.replace(planted, activity=planted.activity[:, order], norms=planted.norms[:, order])


def only_layer(planted: Activations, layer: int) -> Activations:
    """The activations of one layer, as if the model had no other."""
    assert planted.activity is not None and planted.norms is not None
    one = slice(layer, layer + 1)
    return dataclasses.replace(
        planted,
        config=dataclasses.replace(CONFIG, num_layers=1),
        inputs=planted.inputs[one],
        activity=planted.activity[one],
        norms=planted.norms[one],
    )
