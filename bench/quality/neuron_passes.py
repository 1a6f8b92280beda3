"""Jitted passes for `bench.quality.neurons`: one layer at a time, so that compile time doesn't grow with L."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.model import mlp
from polarjax.model.blocks import logits
from polarjax.model.decoder import Decoder, attention_half, mlp_half, prompt_start
from polarjax.model.mlp import active
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.sparsity.kept_share import importance, kept_share
from polarjax.types import Array, Bool, Float, Int


@functools.partial(jax.jit, static_argnames=("config", "window"))
def dense_layer(layer: Any, x: Array, lengths: Array, rotation: Any, config: ModelConfig, window: int | None):
    """One dense layer: the hidden state [B T D], the neurons' outputs [B T F], and which are active [B T F]."""
    after, (h, *_) = attention_half(layer, 0, x, lengths, rotation, config, None, window)
    after, (_, pre, hidden) = mlp_half(layer, 0, after, h, config, None)
    return after, hidden, active(pre, config)


def among_largest(values: Float[Array, "... F"], k: Int[Array, ""]) -> Bool[Array, "... F"]:
    """Whether each value, none of them negative, is at least the k-th largest of its row.

    Finds the k-th largest bit by bit, which is faster on a CPU than sorting; k is traced, so one program serves all.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)  # ordered like the values

    def narrow(i: Array, least: Array) -> Array:
        higher = least | (1 << (30 - i))
        return jnp.where(jnp.sum(bits >= higher, -1, keepdims=True, dtype=jnp.int32) >= k, higher, least)

    return bits >= jax.lax.fori_loop(0, 31, narrow, jnp.zeros((*bits.shape[:-1], 1), jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Shared:
    """Keeps the k neurons with the largest scores, summed over `batch` windows; by importance without a router."""

    layer: mlp.Mlp
    router: LayerRouter | None
    k: Int[Array, ""]
    batch: int

    def neuron_mask(self, i: Any, h: Array, hidden: Float[Array, "B T F"]) -> Bool[Array, "B T F"]:
        """The same mask for the windows of a batch, another at each position."""
        router = self.router
        values = importance(self.layer, hidden)
        scores = values if router is None else Routers((router,)).neuron_scores(0, h)
        B, T, F = scores.shape
        summed = jnp.sum(scores.reshape(B // self.batch, self.batch, T, F), 1)
        return jnp.repeat(among_largest(summed, self.k), self.batch, 0)


@functools.partial(jax.jit, static_argnames=("config", "window", "batch"))
def sparse_layer(
    layer: Any,
    router: LayerRouter | None,
    k: Int[Array, ""],
    x: Array,
    lengths: Array,
    rotation: Any,
    config: ModelConfig,
    window: int | None,
    batch: int,
) -> Array:
    """One layer that keeps k neurons, chosen at each position once for `batch` windows: the hidden state [B T D].

    The score of a neuron is the sum over these windows: of its importance, or, given a router, of the router's scores.
    Neurons as good as the last one are kept too.
    """
    after, (h, *_) = attention_half(layer, 0, x, lengths, rotation, config, None, window)
    return mlp_half(layer, 0, after, h, config, _Shared(layer.mlp, router, k, batch))[0]


@jax.jit
def mean_share(
    layer: Any, hidden: Float[Array, "n F"], index: Int[Array, "g B"], counts: Int[Array, "c"]
) -> Float[Array, "c"]:
    """The mean over batches of `kept_share`, with the neurons ranked by their importance summed over the batch."""

    def one(rows: Array) -> Array:
        batch = hidden[rows]
        return kept_share(layer.mlp, batch, jnp.sum(importance(layer.mlp, batch), 0), counts)

    return jnp.mean(jax.lax.map(one, index, batch_size=max(1, 64 // index.shape[1])), 0)


@jax.jit
def own_top(layer: Any, hidden: Float[Array, "n F"], k: Int[Array, ""]) -> Bool[Array, "n F"]:
    """Each token's k most important neurons."""
    return among_largest(importance(layer.mlp, hidden), k)


@jax.jit
def union(chosen: Bool[Array, "n F"], index: Int[Array, "g B"]) -> Float[Array, ""]:
    """The fraction of neurons that any token of a batch has chosen, averaged over batches."""
    of = lambda rows: jnp.mean(jnp.any(chosen[rows], 0), dtype=jnp.float32)
    return jnp.mean(jax.lax.map(of, index))


@jax.jit
def window_nll(model: Decoder, x: Float[Array, "n T D"], tokens: Int[Array, "n T"]) -> Float[Array, "n"]:
    """Mean negative log-likelihood of each window's tokens after the first, in nats."""

    def one(row: tuple[Array, Array]) -> Array:
        found = logits(model, row[0])
        chosen = jnp.take_along_axis(found, row[1][:, None], -1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(found, -1) - chosen)

    return jax.lax.map(one, (x[:, :-1], tokens[:, 1:]))


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows, and what each pass over them starts from."""

    model: Decoder
    tokens: Int[Array, "n T"]

    @property
    def lengths(self) -> Int[Array, "n"]:
        """All tokens are valid."""
        return jnp.full(self.tokens.shape[:1], self.tokens.shape[1], jnp.int32)

    def dense(self, losses: Float[np.ndarray, "n"]) -> Iterator[tuple[Any, Array, Array]]:
        """Yields each layer, with its neurons' outputs [n·T F] and which are active; writes the windows' losses."""
        config = self.model.config
        x, rotation = prompt_start(self.model, self.tokens, self.lengths)
        for i, layer in enumerate(self.model.layers):
            x, hidden, active = dense_layer(layer, x, self.lengths, rotation, config, config.window(i))
            yield layer, hidden.reshape(-1, config.d_ff), active.reshape(-1, config.d_ff)
        losses[:] = np.asarray(window_nll(self.model, x, self.tokens))

    def sparse(self, kept: tuple[int | None, ...], batch: int, routers: Routers | None) -> np.ndarray:
        """The windows' losses with `kept` neurons in each layer; by importance without routers."""
        config = self.model.config
        x, rotation = prompt_start(self.model, self.tokens, self.lengths)
        for i, (layer, count) in enumerate(zip(self.model.layers, kept, strict=True)):
            window = config.window(i)
            if count is None:
                x = dense_layer(layer, x, self.lengths, rotation, config, window)[0]
                continue
            router = None if routers is None else routers.layers[i]
            k = jnp.asarray(count, jnp.int32)
            x = sparse_layer(layer, router, k, x, self.lengths, rotation, config, window, batch)
        return np.asarray(window_nll(self.model, x, self.tokens), np.float64)
