"""The attention block: projections, and selective attention over the cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import sparse_decode_attention
from polarjax.configs import ModelConfig
from polarjax.model import shapes
from polarjax.model.cache import write_token
from polarjax.model.joining import Update
from polarjax.model.layers import Maker, Norm, Rotation, add_bias, apply_rope, product, product_parts
from polarjax.model.parallel import at_own_sequences, to_groups, to_sequences
from polarjax.types import Array, Bool, Float, Implementation, Int


class Attention(nnx.Module):
    """Projections of one layer; `wq [D K G H]`, `wk, wv [D K H]`, `wo [K G H D]`."""

    def __init__(self, config: ModelConfig, make: Maker):
        D, H, axes = config.d_model, config.head_dim, shapes.attention(config)
        self.wq = make.normal(axes["wq"], fan_in=D)
        self.wk = make.normal(axes["wk"], fan_in=D)
        self.wv = make.normal(axes["wv"], fan_in=D)
        self.wo = make.normal(axes["wo"], fan_in=config.num_heads * H)
        self.bq = self.bk = self.bv = self.bo = self.q_norm = self.k_norm = nnx.data(None)
        if config.qkv_bias:
            self.bq = make.constant(axes["bq"])
            self.bk = make.constant(axes["bk"])
            self.bv = make.constant(axes["bv"])
        if config.out_bias:
            self.bo = make.constant(axes["bo"])
        if config.qk_norm:
            self.q_norm = Norm(config, make, width=H, axis="head", kind="rms")
            self.k_norm = Norm(config, make, width=H, axis="head", kind="rms")


@jax.named_scope("projections")
def project_qkv(
    layer: Attention, x: Float[Array, "B T D"], rotation: Rotation | None
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values of `x`, normalized and rotated if the model does so."""
    q = add_bias(product(x, layer.wq[...]), layer.bq)
    k = add_bias(product(x, layer.wk[...]), layer.bk)
    v = add_bias(product(x, layer.wv[...]), layer.bv)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if rotation is not None:
        q, k = apply_rope(q, rotation), apply_rope(k, rotation)
    return q, k, v


def project_out(
    layer: Attention, heads: Float[Array, "B T K G H"], fill: Float[Array, "B T D"] | None = None
) -> Float[Array, "B T D"]:
    """The output projection, with what replaces groups that were skipped, and its bias."""
    return _update(layer, heads, fill).whole()


@jax.named_scope("projections")
def _update(
    layer: Attention,
    heads: Float[Array, "*rows K G H"],
    fill: Float[Array, "*rows D"] | None,
    summands: int = 0,
) -> Update:
    """`project_out` of this device's groups; in so many summands, if any, unless `fill` is added."""
    if summands and fill is None:
        part = product_parts(heads, layer.wo[...], summands, over=3)
    else:
        part = product(heads, layer.wo[...], over=3)
    return Update(part if fill is None else part + fill, "groups", layer.bo)


def group_norms(heads: Float[Array, "... K G H"]) -> Float[Array, "... K"]:
    """L2 norm of each group's attention output before the output projection, float32: the group's importance."""
    return _root(jnp.sum(jnp.square(heads.astype(jnp.float32)), (-2, -1)))


def contributions(
    layer: Attention, heads: Float[Array, "... K G H"], mean: Float[Array, "K D"] | None
) -> Float[Array, "... K"]:
    """L2 distance of each group's part of the output projection from `mean` (None: from zero), float32.

    Computed from the products of the projection with itself, because the parts [... K D] would not fit.
    """
    wo = layer.wo[...].astype(jnp.float32)
    K, G, H, _ = wo.shape
    rows, flat = wo.reshape(K, G * H, -1), heads.astype(jnp.float32).reshape(*heads.shape[:-3], K, G * H)
    gram = jnp.einsum("kid,kjd->kij", rows, rows)
    square = jnp.sum(jnp.einsum("...ki,kij->...kj", flat, gram) * flat, -1)
    if mean is not None:
        mean = mean.astype(jnp.float32)
        square -= 2 * jnp.einsum("...ki,ki->...k", flat, jnp.einsum("kid,kd->ki", rows, mean))
        square += jnp.expand_dims(jnp.sum(mean * mean, -1), range(square.ndim - 1))
    return _root(square)


def mean_heads(heads: Float[Array, "B T K G H"], lengths: Int[Array, "B"]) -> Float[Array, "B K G H"]:
    """The mean over the valid tokens of each row, float32; zeros for a row without tokens."""
    valid = jnp.arange(heads.shape[1], dtype=jnp.int32)[None] < lengths.astype(jnp.int32)[:, None]
    total = jnp.sum(jnp.where(valid[..., None, None, None], heads.astype(jnp.float32), 0), 1)
    return total / jnp.maximum(lengths, 1).astype(jnp.float32)[:, None, None, None]


def change(before: Float[Array, "... D"], update: Float[Array, "... D"]) -> Float[Array, "..."]:
    """1 - cos(before, before + update), float32: how much attention changes the residual stream's direction (0: not at
    all), hence how important it is in this layer."""
    before, update = before.astype(jnp.float32), update.astype(jnp.float32)
    after = before + update
    lengths = _root(jnp.sum(before * before, -1)) * _root(jnp.sum(after * after, -1))
    return 1 - jnp.sum(before * after, -1) / jnp.where(lengths > 0, lengths, 1)


def _root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root whose gradient at 0 is 0: padding is all zeros."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def mask_groups(
    heads: Float[Array, "... K G H"], mask: Bool[Array, "... K"] | Float[Array, "... K"] | None
) -> Float[Array, "... K G H"]:
    """Zeroes the heads of unselected groups; a mask of floats, 0 or 1, has a gradient."""
    if mask is None:
        return heads
    kept = mask[..., None, None]
    return jnp.where(kept, heads, 0) if kept.dtype == bool else heads * kept.astype(heads.dtype)


def attend_cached(
    layer: Attention,
    x: Float[Array, "B D"],
    cache: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    length: Int[Array, "B"],
    *,
    rotation: Rotation | None,
    group_index: Int[Array, "B k"] | None,
    fill: Float[Array, "B D"] | None,
    live: Bool[Array, "B"] | None,
    config: ModelConfig,
    window: int | None,
    implementation: Implementation,
    summands: int = 0,
) -> tuple[Update, tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]]:
    """One new token per sequence: appends its key and value at `length`, attends with the selected groups only.

    `fill` replaces the other groups' part of the output; None for zeros. Rows that are not `live` append and attend to
    nothing. On a mesh whose devices divide the sequences, all arguments but `layer`, `x` and `rotation` are those of
    this device's sequences. The update comes in so many `summands`, unless `fill` is added to it.
    """
    q, k, v = to_sequences(*(a[:, 0] for a in project_qkv(layer, x[:, None], rotation)))
    capacity = cache[0].shape[2]
    position = length if live is None else jnp.where(live, length, capacity)
    k_cache, v_cache = write_token(cache[0], k, position), write_token(cache[1], v, position)
    readable = jnp.minimum(length + 1, capacity)  # a full cache has dropped the new token
    heads = sparse_decode_attention(
        q,
        k_cache,
        v_cache,
        readable if live is None else jnp.where(live, readable, 0),
        group_index,
        scale=config.head_dim**-0.5,
        window=window,
        implementation=implementation,
    )
    update = _update(layer, to_groups(heads), at_own_sequences(fill), summands)
    return update, (k_cache, v_cache)
