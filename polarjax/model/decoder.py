"""The one decoder: `forward` over whole sequences, `prefill` of a cache, `decode_step` of one token per sequence."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from polarjax.configs import ModelConfig
from polarjax.model import attention, mlp, prompt_attention
from polarjax.model.blocks import logits, residual, rotation_of
from polarjax.model.cache import KVCache, write_prompt
from polarjax.model.checks import (
    as_live,
    as_prompts,
    as_step,
    check_cache,
    check_capacity,
    check_implementation,
    check_model,
    check_taps,
)
from polarjax.model.layers import Embedding, Head, Maker, Norm
from polarjax.model.layout import Layout
from polarjax.model.meshes import on_any_mesh
from polarjax.model.parallel import over_data, to_sequences
from polarjax.model.spread import spread_prefill, spread_step
from polarjax.model.spread_checks import check_around, check_batch, check_spread
from polarjax.model.step import step
from polarjax.model.taps import Taps, TapSpec, pack
from polarjax.selection.checks import check_sparsity
from polarjax.selection.means import importance_of, mean_output
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Bool, Float, Implementation, Int


class Layer(nnx.Module):
    """One decoder layer: attention and MLP, each with its norm."""

    def __init__(self, config: ModelConfig, make: Maker):
        self.attn_norm = Norm(config, make, width=config.d_model)
        self.attn = attention.Attention(config, make)
        self.mlp_norm = Norm(config, make, width=config.d_model)
        self.mlp = mlp.Mlp(config, make)


class Decoder(nnx.Module):
    """A decoder-only language model; a pytree whose `config` is static.

    Args:
      config: shapes, and the variants that distinguish families.
      rngs: random streams; `params` initializes the weights. None gives shapes and dtypes without memory.
      dtype: dtype of parameters and activations; logits, softmax, norms and router scores are float32.

    Attributes:
      layout: how the model lies on a mesh of devices (`polarjax.shard`); None on one device. Static.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, dtype: jnp.dtype = jnp.float32):
        make = Maker(rngs, jnp.dtype(dtype))
        self.config = config
        self.layout: Layout | None = None
        self.embed = Embedding(config, make)
        self.layers = nnx.List([Layer(config, make) for _ in range(config.num_layers)])
        self.final_norm = Norm(config, make, width=config.d_model) if config.final_norm else None
        self.head = None if config.tie_embeddings else Head(config, make)

    @property
    def dtype(self) -> jnp.dtype:
        """The parameters' dtype."""
        return self.embed.tokens[...].dtype


@on_any_mesh("tokens", lambda places: (places.sequence_logits, places.rows))
def forward(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    sparsity: Sparsity | None = None,
    taps: TapSpec | None = None,
) -> tuple[Float[Array, "B T V"], Taps | None]:
    """Logits at every position of a right-padded batch; sparsity is applied by masking, per token.

    Computes everything and zeroes what is not selected: for accuracy, not for speed.

    Args:
      model: the decoder.
      tokens: int32 [B T].
      lengths: valid tokens of each row, int32 [B]; logits beyond them are undefined.
      sparsity: what to skip; None is the dense model.
      taps: what to record.

    Returns:
      float32 logits [B T V], and the records (None without `taps`).

    Raises:
      InputError: tokens or lengths have the wrong shape or dtype, or T exceeds a learned position table.
      SparsityError: routers or plan are for another model.
    """
    check_model(model, where="forward")
    check_around(model)
    check_sparsity(sparsity, model.config)
    check_taps(taps)
    tokens, lengths = as_prompts(model.config, tokens, lengths, where="forward")
    x, records, _ = _blocks(model, tokens, lengths, sparsity=sparsity, taps=taps)
    return logits(model, x), records


@on_any_mesh("tokens", lambda places: (places.logits, places.cache))
def prefill(
    model: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads the prompts densely and fills the cache.

    Args:
      model: the decoder.
      tokens: right-padded prompts, int32 [B T].
      lengths: valid tokens of each row, int32 [B], at least 1.
      cache: an empty cache of capacity S >= T; donate it under `jax.jit`.

    Returns:
      float32 logits [B V] after each row's last token, and the filled cache.

    Raises:
      InputError: T exceeds the cache's capacity or a learned position table, or the cache is for another batch,
        model or dtype.
    """
    check_model(model, where="prefill")
    check_around(model)
    tokens, lengths = as_prompts(model.config, tokens, lengths, where="prefill")
    check_cache(model.config, model.dtype, cache, tokens.shape[0], where="prefill")
    check_capacity(cache, tokens.shape[1])
    check_batch(model, None, tokens.shape[0], where="prefill")
    if model.layout is None:
        return _prefill(model, tokens, lengths, cache)
    return spread_prefill(_prefill, model, tokens, lengths, cache)


def _prefill(model: Decoder, tokens, lengths, cache: KVCache) -> tuple[Float[Array, "B V"], KVCache]:
    """`prefill` on one device, or one device's part of it."""
    x, _, kv = _blocks(model, tokens, lengths)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], 1)[:, 0]
    pairs = [
        tuple(map(write_prompt, old, to_sequences(*new, dimension=2)))
        for old, new in zip(zip(cache.k, cache.v, strict=True), kv, strict=True)
    ]
    k, v = zip(*pairs, strict=True)
    return logits(model, last), KVCache(k, v, lengths.astype(jnp.int32))


def _blocks(model, tokens, lengths, *, sparsity=None, taps=None):
    """All layers over [B T]: the last hidden state, the records, and each layer's keys and values."""
    config = model.config
    x, rotation = prompt_start(model, tokens, lengths)
    records, kv = [], []
    for i, layer in enumerate(model.layers):
        with jax.named_scope(f"layer_{i}"):
            x, record, pair = prompt_layer(layer, i, x, lengths, rotation, config, sparsity, config.window(i))
        records.append(record)
        kv.append(pair)
    return x, None if taps is None else Taps.of(taps, records), kv


def prompt_start(
    model: Any, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], start: Int[Array, "B"] | None = None
):
    """The embedded tokens and the rotation of their positions, which begin at `start` (None: 0)."""
    column = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    positions = column if start is None else column + start[:, None]
    x = over_data(getattr(model, "layout", None), model.embed(tokens, positions))
    x = jnp.where((column < lengths[:, None])[..., None], x, 0)  # padding counts as zeros, whatever its ids
    return x, rotation_of(model.config, positions)


def prompt_layer(
    layer: Layer, i: Any, x, lengths, rotation, config: ModelConfig, sparsity, window: int | None
):
    """Layer `i` over [B T]: the hidden state, all possible records, and the keys and values."""
    after, (h, norm, change, mean, pair) = attention_half(
        layer, i, x, lengths, rotation, config, sparsity, window
    )
    after, (_, pre, _) = mlp_half(layer, i, after, h, config, sparsity)
    return after, (h, pack(mlp.active(pre, config)), norm, change, mean), pair


def attention_half(
    layer: Layer, i: Any, x, lengths, rotation, config: ModelConfig, sparsity, window: int | None
):
    """The first half of `prompt_layer`: the hidden state, then its input (which routers read), importance, change,
    mean, and the keys and values."""

    def attend(h):
        q, k, v = attention.project_qkv(layer.attn, h, rotation)
        heads = prompt_attention.attend(q, k, v, lengths, window=window)
        norm = _importance(layer.attn, i, heads, sparsity)
        update = _attention_output(layer.attn, i, h, heads, norm, sparsity)
        mean = attention.mean_heads(heads, lengths)
        return update, (h, norm, attention.change(x, update), mean, (k, v))

    return residual(layer.attn_norm, x, attend, config)


def mlp_half(layer: Layer, i: Any, x, h, config: ModelConfig, sparsity):
    """The second half of `prompt_layer`: the hidden state, then its input, and each neuron's pre-activation and output;
    routers read `h`, the input of the first half."""

    def feed(y):
        pre, hidden = mlp.neurons(layer.mlp, y, config)
        mask = None if sparsity is None else sparsity.neuron_mask(i, h, hidden)
        return mlp.combine(layer.mlp, hidden, mask), (y, pre, hidden)

    return residual(layer.mlp_norm, x, feed, config)


def _importance(layer: attention.Attention, i: int, heads, sparsity):
    """How important each group is, by the measure that the selector ranks groups with."""
    if sparsity is None or importance_of(sparsity.routers) == "norms":
        return attention.group_norms(heads)
    return attention.contributions(layer, heads, mean_output(sparsity.routers, i))


def _attention_output(layer: attention.Attention, i: int, h, heads, norm, sparsity):
    """The output projection of the selected groups, with what replaces the others."""
    if sparsity is None:
        return attention.project_out(layer, heads)
    kept = sparsity.group_mask(i, h, norm)
    return attention.project_out(
        layer, attention.mask_groups(heads, kept), sparsity.fill(i, kept, heads.dtype)
    )


@on_any_mesh("token", lambda places: (places.logits, places.cache))
def decode_step(
    model: Decoder,
    token: Int[Array, "B"],
    cache: KVCache,
    *,
    sparsity: Sparsity | None = None,
    live: Bool[Array, "B"] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Appends one token to each sequence; computes and reads only what is selected.

    Groups are chosen per sequence, neurons once per batch; the cache stays complete.

    Args:
      model: the decoder.
      token: int32 [B].
      cache: keys and values so far; donate it under `jax.jit`. A sequence that is full drops the new key.
      sparsity: what to skip; None is the dense model.
      live: rows whose logits are wanted; the others keep their cache as it is, read none of it and don't affect the
        choice of neurons. None means all.
      implementation: "mosaic" (our kernels, for Hopper GPUs) or "xla"; None takes the best for the device.
        On several Hopper GPUs of a process, a kernel also sums what they computed, unless this is "xla" or it can't;
        then XLA does.

    Returns:
      float32 logits [B V] for the next token, undefined in rows that are not live, and the cache, one position
      longer in live rows.

    Raises:
      InputError: the cache is for another batch, model or dtype.
      SparsityError: routers or plan are for another model, or the selector cannot skip work.
    """
    check_model(model, where="decode_step")
    check_around(model)
    check_sparsity(sparsity, model.config)
    check_implementation(implementation)
    check_spread(model, sparsity)
    token = as_step(token)
    check_cache(model.config, model.dtype, cache, token.shape[0], where="decode_step")
    live = as_live(live, token.shape[0])
    check_batch(model, sparsity, token.shape[0])
    if model.layout is None:
        return step(model, token, cache, sparsity, live, model.config, implementation)
    run = lambda model, token, cache, sparsity, live: step(
        model, token, cache, sparsity, live, model.layout.local(model.config), implementation
    )
    return spread_step(run, model, token, cache, sparsity, live)
