"""The one decoder: `forward` over whole sequences, `prefill` of a cache, `decode_step` of one token a sequence."""

import jax
import jax.numpy as jnp
from flax import nnx

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model import attention, mlp
from polarjax.model.cache import KVCache, write_prompt
from polarjax.model.layers import Embedding, Head, Maker, Norm
from polarjax.model.taps import Taps, TapSpec, pack
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
      config: shapes and the choices that make the family.
      rngs: random streams; `params` initialises the weights.
      dtype: of parameters and activations; logits, softmax, norms and router scores are float32.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        make = Maker(rngs, jnp.dtype(dtype))
        self.config = config
        self.embed = Embedding(config, make)
        self.layers = nnx.List([Layer(config, make) for _ in range(config.num_layers)])
        self.final_norm = Norm(config, make, width=config.d_model) if config.final_norm else None
        self.head = None if config.tie_embeddings else Head(config, make)

    @property
    def dtype(self) -> jnp.dtype:
        """The parameters' dtype."""
        return self.embed.tokens[...].dtype


def logits(model: Decoder, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Final norm and head; float32."""
    if model.final_norm is not None:
        x = model.final_norm(x)
    if model.embed.project_out is not None:
        x = x @ model.embed.project_out[...]
    table = (model.embed.tokens if model.head is None else model.head.w)[...]
    return jnp.dot(x, table.T, preferred_element_type=jnp.float32)


def forward(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    sparsity: Sparsity | None = None,
    taps: TapSpec | None = None,
) -> tuple[Float[Array, "B T V"], Taps | None]:
    """Logits at every position of a right-padded batch; sparsity is applied by masking, per token.

    Computes everything and zeroes what is not selected: the oracle of accuracy, not of speed.

    Args:
      model: the decoder.
      tokens: int32 [B T].
      lengths: valid tokens of each row, int32 [B]; logits beyond them hold no meaning.
      sparsity: what to skip; None is the dense model.
      taps: what to record.

    Returns:
      float32 logits [B T V], and the records (None without `taps`).

    Raises:
      SparsityError: routers or plan are for another model.
    """
    x, records, _ = _blocks(model, tokens, lengths, sparsity=sparsity, taps=taps)
    return logits(model, x), records


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
      InputError: T exceeds the cache's capacity, or the cache is for another batch or model.
    """
    B, K, H = tokens.shape[0], model.config.num_kv_heads, model.config.head_dim
    got = (len(cache.k), cache.k[0].shape[0], cache.k[0].shape[1], cache.k[0].shape[3])
    if got != (model.config.num_layers, B, K, H):
        raise InputError(
            "the cache is for another batch or model",
            where="prefill",
            got="{} layers of [{} {} S {}]".format(*got),
            expected=f"{model.config.num_layers} layers of [{B} {K} S {H}]",
            hint="make it with init_cache for this config and batch size",
        )
    if tokens.shape[1] > cache.capacity:
        raise InputError(
            "the prompts do not fit into the cache",
            where="prefill",
            got=f"{tokens.shape[1]} tokens",
            expected=f"at most the cache's capacity of {cache.capacity}",
            hint="pass a larger capacity to init_cache",
        )
    x, _, kv = _blocks(model, tokens, lengths)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], 1)[:, 0]
    k = tuple(write_prompt(old, new) for old, (new, _) in zip(cache.k, kv, strict=True))
    v = tuple(write_prompt(old, new) for old, (_, new) in zip(cache.v, kv, strict=True))
    return logits(model, last), KVCache(k, v, lengths.astype(jnp.int32))


def _blocks(model, tokens, lengths, *, sparsity=None, taps=None):
    """All layers over [B T]: the last hidden state, the records, and each layer's keys and values."""
    config = model.config
    if sparsity is not None:
        sparsity.check(config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    valid = positions < lengths[:, None]
    x = model.embed(tokens, positions)
    x = jnp.where(valid[..., None], x, 0)  # padding is read as zeros, whatever it holds
    inputs, activity, norms, changes, kv = [], [], [], [], []
    for i, layer in enumerate(model.layers):
        with jax.named_scope(f"layer_{i}"):
            h = layer.attn_norm(x) if config.norm_position == "pre" else x
            q, k, v = attention.project_qkv(layer.attn, h, positions, config)
            heads = attention.attend(q, k, v, lengths, window=config.window(i))
            norm = attention.group_norms(heads)
            if sparsity is not None:
                heads = attention.mask_groups(heads, sparsity.group_mask(i, h, norm))
            update = attention.project_out(layer.attn, heads)
            changes += [attention.change(x, update)] if taps is not None and taps.change else []
            x = _residual(layer.attn_norm, x, update, config)
            pre, hidden = mlp.neurons(layer.mlp, _mlp_input(layer, x, config), config)
            mask = None if sparsity is None else sparsity.neuron_mask(i, h, hidden)
            x = _residual(layer.mlp_norm, x, mlp.combine(layer.mlp, hidden, mask), config)
        kv.append((k, v))
        if taps is not None:
            inputs += [h] * taps.inputs
            activity += [pack(mlp.active(pre, config))] * taps.activity
            norms += [norm] * taps.norms
    records = None if taps is None else Taps(*map(tuple, (inputs, activity, norms, changes)))
    return x, records, kv


def _mlp_input(layer: Layer, x: Float[Array, "... D"], config: ModelConfig) -> Float[Array, "... D"]:
    return layer.mlp_norm(x) if config.norm_position == "pre" else x


def _residual(norm: Norm, x: Float[Array, "... D"], update: Float[Array, "... D"], config: ModelConfig):
    return x + update if config.norm_position == "pre" else norm(x + update)


def decode_step(
    model: Decoder,
    token: Int[Array, "B"],
    cache: KVCache,
    *,
    sparsity: Sparsity | None = None,
    live: Bool[Array, "B"] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Appends one token to each sequence, computing and reading only what is selected.

    Groups are chosen for each sequence, neurons once for the batch; the cache itself stays complete.

    Args:
      model: the decoder.
      token: int32 [B].
      cache: keys and values so far; donate it under `jax.jit`. A sequence that is full drops the new key.
      sparsity: what to skip; None is the dense model.
      live: rows whose logits are wanted; the others read no cache and have no say in the choice of neurons.
        None is all.
      implementation: of the kernels; None takes the best for the device.

    Returns:
      float32 logits [B V] for the next token, without meaning in rows that are not live, and the cache one position
      longer.

    Raises:
      SparsityError: routers or plan are for another model, or the selector cannot skip work.
    """
    config = model.config
    if sparsity is not None:
        sparsity.check(config)
    x = model.embed(token, cache.length)
    new_k, new_v = [], []
    for i, layer in enumerate(model.layers):
        with jax.named_scope(f"layer_{i}"):
            h = layer.attn_norm(x) if config.norm_position == "pre" else x
            update, (k, v) = attention.attend_cached(
                layer.attn,
                h,
                (cache.k[i], cache.v[i]),
                cache.length,
                group_index=None if sparsity is None else sparsity.group_index(i, h),
                live=live,
                config=config,
                window=config.window(i),
                implementation=implementation,
            )
            x = _residual(layer.attn_norm, x, update, config)
            index = None if sparsity is None else sparsity.neuron_index(i, h, live)
            update = _mlp(layer, _mlp_input(layer, x, config), index, config, implementation)
            x = _residual(layer.mlp_norm, x, update, config)
        new_k.append(k)
        new_v.append(v)
    return logits(model, x), KVCache(tuple(new_k), tuple(new_v), cache.length + 1)


def _mlp(layer: Layer, x, index, config: ModelConfig, implementation: Implementation):
    if index is None:
        return mlp.combine(layer.mlp, mlp.neurons(layer.mlp, x, config)[1], None)
    return mlp.selected(layer.mlp, x, index, config=config, implementation=implementation)
