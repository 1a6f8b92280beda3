"""The end of half a layer in a decoding step: its update joins the residual stream, which is normalized."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from pallas_kernels import Link, all_reduce_norm
from polarjax.configs import ModelConfig
from polarjax.model.layers import Norm, add_bias
from polarjax.model.parallel import is_divided, linked, summed
from polarjax.types import Array, Float, Implementation, Int

SUMMANDS = (8, 4, 2)
"""In how many parts the kernel takes a product, the best first. XLA makes products of few rows in such parts, too."""


class Update(NamedTuple):
    """What half a layer adds to the residual stream.

    Attributes:
      part: this device's part of it, [... D], or float32 summands [S B D] for a kernel that adds them up.
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
    """Joins the updates of a step, one after the other, by a kernel where Hopper GPUs must sum them.

    XLA adds up a product's parts, sums over the devices and normalizes, each in a kernel. On one GPU it needs two, which
    are as fast as one of ours.

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
        self._rows, self._sums = token.shape[0], 0

    def summands(self, axis: str, count: int, norm: Norm | None) -> int:
        """How many summands `__call__` wants of an update that adds up `count` products; 0 for the update itself."""
        if self._rows == 1 or norm is None or self._link_for(axis) is None:
            return 0
        return next((parts for parts in SUMMANDS if count % (16 * parts) == 0 and count >= 256 * parts), 0)

    def _link_for(self, axis: str) -> Link | None:
        """What the kernel needs to sum what the devices that divide the axis have; None where XLA must."""
        return self._link if is_divided(axis) else None

    def __call__(
        self, x: Float[Array, "B D"], update: Update, norm: Norm | None
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        """The residual stream after an update, and what the next half of a layer or the head reads.

        `norm` is that of what follows, or, in a model that normalizes after the sum, that of the half that ends.
        """
        link = self._link_for(update.axis)
        if link is None or norm is None:
            x = x + update.whole()
            normed = x if norm is None else norm(x)
            return (x if self._before else normed), normed
        self._sums += 1
        value = lambda parameter: None if parameter is None else parameter[...]
        return all_reduce_norm(
            update.part,
            x,
            norm.scale[...],
            link,
            self._sums,
            bias=value(update.bias),
            shift=value(norm.bias),
            kind=norm.kind,
            eps=norm.eps,
        )
