"""A decoding step: on one device, or one device's part of it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.configs import ModelConfig
from polarjax.model import attention, mlp
from polarjax.model.blocks import head, logits, rotation_of
from polarjax.model.cache import KVCache
from polarjax.model.joining import Joining, Update
from polarjax.model.parallel import own_sequences
from polarjax.types import Array, Float


def step(
    model: Any, token, cache: KVCache, sparsity, live, config: ModelConfig, implementation
) -> tuple[Float[Array, "B V"], KVCache]:
    """`decode_step` on one device, or one device's part of it; `config` has the sizes that this device sees."""
    join = Joining(token, config, model.dtype, implementation)
    x = model.embed(token, cache.length)
    rotation = rotation_of(config, cache.length[:, None])
    before = config.norm_position == "pre"
    h, pairs = model.layers[0].attn_norm(x) if before else x, []
    following = [layer.attn_norm for layer in model.layers[1:]] + [model.final_norm]
    for i, layer in enumerate(model.layers):
        norms = (layer.mlp_norm, following[i]) if before else (layer.attn_norm, layer.mlp_norm)
        with jax.named_scope(f"layer_{i}"):
            parts = join.summands("groups", math.prod(layer.attn.wo.shape[:3]), norms[0])
            update, pair = _attend(
                layer, i, h, cache, rotation, config, sparsity, live, implementation, parts
            )
            x, y = join(x, update, norms[0])
            parts = join.summands("neurons", layer.mlp.w_down.shape[0], norms[1])
            update = _feed(layer, i, y, h, config, sparsity, live, implementation, parts)
            x, h = join(x, update, norms[1])
        pairs.append(pair)
    k, v = zip(*pairs, strict=True)
    grown = cache.length + (1 if live is None else live.astype(jnp.int32))
    return head(model, h) if before else logits(model, x), KVCache(k, v, grown)


def _attend(
    layer: Any,
    i: int,
    h,
    cache: KVCache,
    rotation,
    config: ModelConfig,
    sparsity,
    live,
    implementation,
    summands,
):
    """The attention of layer `i` for one new token per sequence: its update, and the cache's keys and values."""
    index = None if sparsity is None else sparsity.group_index(i, own_sequences(h), config)
    return attention.attend_cached(
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
        summands=summands,
    )


def _feed(layer: Any, i: int, y, h, config: ModelConfig, sparsity, live, implementation, summands) -> Update:
    """The MLP of layer `i`; routers read `h`, the attention's input."""
    if sparsity is None or sparsity.plan.neurons[i] is None:
        return mlp.dense(layer.mlp, y, config, summands)
    parts = sparsity.plan.batch_shards
    rows = lambda x: [None] * parts if x is None else jnp.split(x, parts)
    done = []
    for own_y, own_h, own_live in zip(rows(y), rows(h), rows(live), strict=True):
        index = sparsity.neuron_index(i, own_h, config, own_live)
        done.append(mlp.selected(layer.mlp, own_y, index, config=config, implementation=implementation))
    return done[0] if parts == 1 else done[0]._replace(part=jnp.concatenate([each.part for each in done]))
