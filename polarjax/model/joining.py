"""The end of half a layer in a decoding step: its update joins the residual stream, which is normalized."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from pallas_kernels import Link, all_reduce_norm
from polarjax.configs import ModelConfig
from polarjax.model.layers import Norm, add_bias
from polarjax.model.parallel import is_divided, linked, summed
from polarjax.types import Array, Float, Implementation, Int


class Update(NamedTuple):
    """What half a layer adds to the residual stream.

    Attributes:
      part: this device's part of it, [... D].
      axis: the logical axis that the devices divide in it.
      bias: added once, to the sum of all parts.
    """

    part: Float[Array, "... D"]
    axis: str
    bias: nnx.Param | None

    def whole(self) -> Float[Array, "... D"]:
        """The sum of all devices' parts, and the bias."""
        return add_bias(summed(self.part, self.axis), self.bias)


class Joining:
    """Joins the updates of a step, one after the other, in a kernel of its own where devices must sum them.

    On one GPU, XLA makes a kernel of addition and norm that is as fast.

    Args:
      token: of this step.
      config: the model's configuration.
      dtype: of the residual stream.
      implementation: of the step; "xla" sums by XLA.
    """

    def __init__(
        self, token: Int[Array, "B"], config: ModelConfig, dtype: jnp.dtype, implementation: Implementation
    ):
        self._before = config.norm_position == "pre"
        fits = self._before and dtype == jnp.bfloat16 and implementation != "xla"
        self._link: Link | None = linked(token, config.d_model, implementation) if fits else None
        self._sums = 0

    def __call__(
        self, x: Float[Array, "B D"], update: Update, norm: Norm | None
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        """The residual stream after an update, and what the next half of a layer or the head reads.

        `norm` is that of what follows, or, in a model that normalizes after the sum, that of the half that ends.
        """
        if self._link is None or norm is None or not is_divided(update.axis):
            x = x + update.whole()
            normed = x if norm is None else norm(x)
            return (x if self._before else normed), normed
        self._sums += 1
        value = lambda parameter: None if parameter is None else parameter[...]
        return all_reduce_norm(
            update.part,
            x,
            norm.scale[...],
            self._link,
            self._sums,
            bias=value(update.bias),
            shift=value(norm.bias),
            kind=norm.kind,
            eps=norm.eps,
        )
