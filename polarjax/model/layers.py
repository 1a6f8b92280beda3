"""Parameters with logical axis names, norms, embeddings and the rotary embedding."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from polarjax.configs import ModelConfig, NormKind, RopeConfig
from polarjax.model import shapes
from polarjax.model.parallel import table_rows
from polarjax.types import Array, Float, Int


class Maker:
    """Makes initialized parameters; holds the random stream and the dtype while a decoder is built.

    Without a random stream a parameter is a `jax.ShapeDtypeStruct`.
    """

    def __init__(self, rngs: nnx.Rngs | None, dtype: jnp.dtype):
        self._rngs = rngs
        self._dtype = dtype

    def normal(self, axes: shapes.Axes, *, fan_in: int) -> nnx.Param:
        """A parameter drawn from a normal distribution with standard deviation `fan_in ** -0.5`."""
        if self._rngs is None:
            return self._abstract(axes)
        shape = tuple(axes.values())
        value = jax.random.normal(self._rngs.params(), shape, jnp.float32) * fan_in**-0.5
        return nnx.Param(value.astype(self._dtype), axes=tuple(axes))

    def constant(self, axes: shapes.Axes, *, value: float = 0.0) -> nnx.Param:
        """A parameter filled with one value."""
        if self._rngs is None:
            return self._abstract(axes)
        return nnx.Param(jnp.full(tuple(axes.values()), value, self._dtype), axes=tuple(axes))

    def _abstract(self, axes: shapes.Axes) -> nnx.Param:
        return nnx.Param(jax.ShapeDtypeStruct(tuple(axes.values()), self._dtype), axes=tuple(axes))


class Norm(nnx.Module):
    """RMS or layer norm over the last axis, computed in float32."""

    def __init__(
        self,
        config: ModelConfig,
        make: Maker,
        *,
        width: int,
        axis: str = "embed",
        kind: NormKind | None = None,
    ):
        self.kind: NormKind = kind or config.norm
        self.eps = config.norm_eps
        axes = shapes.norm(config, width, axis=axis, kind=kind)
        self.scale = make.constant(axes["scale"], value=1.0)
        self.bias = make.constant(axes["bias"]) if "bias" in axes else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if (
            x.ndim == 2 and x.shape[0] == 1
        ):  # XLA makes up to three kernels of one row's norm, and one of two rows'
            return self(jnp.concatenate([x, jnp.zeros_like(x)]))[:1]
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), range(y.ndim - 1))
        y = y * scale
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...].astype(jnp.float32), range(y.ndim - 1))
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Token (and learned position) embeddings, with the projections of a table narrower than the model."""

    def __init__(self, config: ModelConfig, make: Maker):
        width, axes = config.embed_dim or config.d_model, shapes.embedding(config)
        self.tokens = make.normal(axes["tokens"], fan_in=width)
        self.positions = self.project_in = self.project_out = nnx.data(None)
        self.position_offset = config.position_offset
        if config.positions == "learned":
            self.positions = make.normal(axes["positions"], fan_in=config.d_model)
        if config.embed_dim is not None:
            self.project_in = make.normal(axes["project_in"], fan_in=width)
            self.project_out = make.normal(axes["project_out"], fan_in=config.d_model)

    def __call__(self, tokens: Int[Array, "..."], positions: Int[Array, "..."]) -> Float[Array, "... D"]:
        x = table_rows(self.tokens[...], tokens)
        if self.project_in is not None:
            x = x @ self.project_in[...]
        if self.positions is not None:
            x = x + self.positions[...][positions + self.position_offset]
        return x


class Head(nnx.Module):
    """The output projection of a model with untied embeddings."""

    def __init__(self, config: ModelConfig, make: Maker):
        self.w = make.normal(shapes.head(config)["w"], fan_in=config.embed_dim or config.d_model)


def product(x: Float[Array, "..."], weights: Float[Array, "..."], over: int = 1) -> Float[Array, "..."]:
    """The sums of x · weights over the last `over` axes of `x` and the first ones of `weights`.

    `einsum` sorts the axes that it sums over, and XLA transposes weights for that in every call. A single row is
    computed twice: XLA makes a sum over a matrix's rows of its product with one row, on as few as five of a GPU's
    multiprocessors, which took half of a step of LLaMA-3.1-8B at batch 1.
    """
    rows = x.shape[:-over]
    alone = bool(rows) and all(size == 1 for size in rows)
    found = jnp.tensordot(jnp.repeat(x, 2, 0) if alone else x, weights, over)
    return found[:1] if alone else found


def product_parts(
    x: Float[Array, "B ..."], weights: Float[Array, "... D"], parts: int, over: int = 1
) -> Float[Array, "S B D"]:
    """`product` of [B ...] as float32 summands, each over an equal part of what is summed.

    XLA makes a long sum for few rows in such parts anyway, and adds them in a kernel of its own.
    """
    rows = x.reshape(x.shape[0], parts, -1)
    columns = weights.reshape(parts, -1, *weights.shape[over:])
    return jax.lax.dot_general(
        rows, columns, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32
    )


def add_bias(x: Float[Array, "..."], bias: nnx.Param | None) -> Float[Array, "..."]:
    """Adds a bias over the trailing axes of `x`, or nothing."""
    if bias is None:
        return x
    value = bias[...]
    return x + jnp.expand_dims(value, range(x.ndim - value.ndim))


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float[Array, "half"]:
    """Angular frequency of each rotated pair, in radians per position, float32 [H/2]."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / (rope.theta**exponent)
    if rope.scaling is None:
        return frequency
    if rope.scaling == "linear":
        return frequency / rope.factor
    wavelength = 2 * math.pi / frequency
    context = rope.original_max_positions or 0
    kept = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return (1 - kept) * frequency / rope.factor + kept * frequency


type Rotation = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
"""Cosine and sine of the angle by which each pair of a head is rotated; the same in all layers."""


def rope_rotation(positions: Int[Array, "B T"], rope: RopeConfig, head_dim: int) -> Rotation:
    """Cosine and sine of the rotation at each position, float32."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Float[Array, "B T *heads H"], rotation: Rotation) -> Float[Array, "B T *heads H"]:
    """Rotates the pair (i, i + H/2) of each head by `position * frequency[i]` (the half-split convention of HF)."""
    half = x.shape[-1] // 2
    cos, sin = (jnp.expand_dims(part, range(2, x.ndim - 1)) for part in rotation)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
