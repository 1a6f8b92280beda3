"""The MLP block: dense over a prompt, masked for accuracy studies, gathered for decoding."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import sparse_mlp
from polarjax.configs import ModelConfig
from polarjax.model import shapes
from polarjax.model.joining import Update
from polarjax.model.layers import Maker, add_bias, product, product_parts
from polarjax.types import Array, Bool, Float, Implementation, Int

_ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


def active(pre: Float[Array, "... F"], config: ModelConfig) -> Bool[Array, "... F"]:
    """Which pre-activations exceed the threshold; compared in float32, so that the threshold isn't rounded."""
    return pre.astype(jnp.float32) > jnp.float32(config.activation_threshold)


def activate(pre: Float[Array, "... F"], config: ModelConfig) -> Float[Array, "... F"]:
    """The activation function of the config."""
    if config.activation_threshold:
        return jnp.where(active(pre, config), pre, 0)
    return _ACTIVATIONS[config.activation](pre)


class Mlp(nnx.Module):
    """Neuron-major weights `w_up, w_gate, w_down [F D]`: neuron j is row j of each."""

    def __init__(self, config: ModelConfig, make: Maker):
        D, F, axes = config.d_model, config.d_ff, shapes.mlp(config)
        self.w_up = make.normal(axes["w_up"], fan_in=D)
        self.w_down = make.normal(axes["w_down"], fan_in=F)
        self.w_gate = make.normal(axes["w_gate"], fan_in=D) if config.gated_mlp else None
        self.b_up = self.b_gate = self.b_down = nnx.data(None)
        if config.mlp_bias:
            self.b_up = make.constant(axes["b_up"])
            self.b_gate = make.constant(axes["b_gate"]) if config.gated_mlp else None
            self.b_down = make.constant(axes["b_down"])


def neurons(
    layer: Mlp, x: Float[Array, "... D"], config: ModelConfig
) -> tuple[Float[Array, "... F"], Float[Array, "... F"]]:
    """Pre-activation and output of every neuron; the pre-activation is the gate's in a gated MLP."""
    up = add_bias(product(x, layer.w_up[...].T), layer.b_up)
    if layer.w_gate is None:
        return up, activate(up, config)
    gate = add_bias(product(x, layer.w_gate[...].T), layer.b_gate)
    return gate, activate(gate, config) * up


def usage(pre: Float[Array, "... F"], config: ModelConfig) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """How many neurons a token uses, float32: the fraction that is active, and the L1 norm of the activations a in
    units of their root mean square, mean|a| / sqrt(mean a²), both means over the F neurons.

    The second is differentiable, the same for any scale of a and any F, 1 if all are equally large and about
    sqrt(m / F) if m of them are; it is the square root of the Hoyer-square regularizer over F (DeepHoyer, Yang et al.,
    arXiv 1908.09979).
    """
    values = activate(pre, config).astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(values), -1) + 1e-20)
    return jnp.mean(active(pre, config), -1, dtype=jnp.float32), jnp.mean(jnp.abs(values), -1) / size


def combine(
    layer: Mlp, hidden: Float[Array, "... F"], mask: Bool[Array, "... F"] | None
) -> Float[Array, "... D"]:
    """The down-projection of the (selected) neurons' outputs."""
    hidden = hidden if mask is None else jnp.where(mask, hidden, 0)
    return _update(layer, hidden).whole()


def _update(layer: Mlp, hidden: Float[Array, "... F"], summands: int = 0) -> Update:
    """The down-projection of this device's neurons, in so many summands, if any."""
    down = layer.w_down[...]
    part = product_parts(hidden, down, summands) if summands else product(hidden, down)
    return Update(part, "neurons", layer.b_down)


@jax.named_scope("mlp")
def dense(layer: Mlp, x: Float[Array, "... D"], config: ModelConfig, summands: int = 0) -> Update:
    """The MLP with all its neurons; the update in so many summands, if any."""
    return _update(layer, neurons(layer, x, config)[1], summands)


@jax.named_scope("mlp")
def selected(
    layer: Mlp,
    x: Float[Array, "B D"],
    index: Int[Array, "k"],
    *,
    config: ModelConfig,
    implementation: Implementation,
) -> Update:
    """The MLP computed from the selected neurons' rows only."""
    value = lambda parameter: None if parameter is None else parameter[...]
    y = sparse_mlp(
        x,
        layer.w_up[...],
        layer.w_down[...],
        index,
        w_gate=value(layer.w_gate),
        b_up=value(layer.b_up),
        b_gate=value(layer.b_gate),
        activation=config.activation,
        threshold=config.activation_threshold,
        implementation=implementation,
    )
    return Update(y, "neurons", layer.b_down)
