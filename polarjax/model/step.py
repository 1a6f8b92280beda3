"""A decoding step: on one device, or one device's part of it."""

from typing import Any

import jax
import jax.numpy as jnp

from polarjax.configs import ModelConfig
from polarjax.model import attention, mlp
from polarjax.model.blocks import logits, residual, rotation_of
from polarjax.model.cache import KVCache
from polarjax.model.parallel import own_sequences
from polarjax.types import Array, Float


def step(
    model: Any, token, cache: KVCache, sparsity, live, config: ModelConfig, implementation
) -> tuple[Float[Array, "B V"], KVCache]:
    """`decode_step` on one device, or one device's part of it; `config` has the sizes that this device sees."""
    x = model.embed(token, cache.length)
    rotation = rotation_of(config, cache.length[:, None])
    pairs = []
    for i, layer in enumerate(model.layers):
        with jax.named_scope(f"layer_{i}"):
            x, pair = _step_layer(layer, i, x, cache, rotation, config, sparsity, live, implementation)
        pairs.append(pair)
    k, v = zip(*pairs, strict=True)
    grown = cache.length + (1 if live is None else live.astype(jnp.int32))
    return logits(model, x), KVCache(k, v, grown)


def _step_layer(
    layer: Any, i: int, x, cache: KVCache, rotation, config: ModelConfig, sparsity, live, implementation
):
    """Layer `i` for one new token per sequence: the hidden state, and the cache's keys and values."""

    def attend(h):
        index = None if sparsity is None else sparsity.group_index(i, own_sequences(h), config)
        update, pair = attention.attend_cached(
            layer.attn,
            h,
            (cache.k[i], cache.v[i]),
            own_sequences(cache.length),
            rotation=rotation,
            group_index=index,
            fill=None if sparsity is None else sparsity.fill_unread(i, index, h.dtype),
            live=own_sequences(live),
            config=config,
            window=config.window(i),
            implementation=implementation,
        )
        return update, (h, pair)

    def feed(y):
        if sparsity is None or sparsity.plan.neurons[i] is None:
            return mlp.dense(layer.mlp, y, config), None
        parts = sparsity.plan.batch_shards
        rows = lambda x: [None] * parts if x is None else jnp.split(x, parts)
        done = []
        for own_y, own_h, own_live in zip(rows(y), rows(h), rows(live), strict=True):
            index = sparsity.neuron_index(i, own_h, config, own_live)
            done.append(mlp.selected(layer.mlp, own_y, index, config=config, implementation=implementation))
        return done[0] if parts == 1 else jnp.concatenate(done), None

    x, (h, pair) = residual(layer.attn_norm, x, attend, config)
    return residual(layer.mlp_norm, x, feed, config)[0], pair
