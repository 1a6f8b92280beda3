"""What a prompt and a decoding step share: halves of layers, the rotation of positions, and the head."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.configs import ModelConfig
from polarjax.model.layers import Norm, Rotation, rope_rotation
from polarjax.types import Array, Float, Int

type Block = Callable[[Float[Array, "... D"]], tuple[Float[Array, "... D"], Any]]
"""Half a layer: its input -> its update of the residual stream, and anything else needed later."""


def logits(model: Any, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Final norm and head of a `Decoder` or `StackedDecoder`; float32."""
    return head(model, x if model.final_norm is None else model.final_norm(x))


@jax.named_scope("head")
def head(model: Any, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """`logits` of a hidden state that needs no norm any more."""
    if model.embed.project_out is not None:
        x = x @ model.embed.project_out[...]
    table = (model.embed.tokens if model.head is None else model.head.w)[...]
    return jnp.dot(x, table.T, preferred_element_type=jnp.float32)


def rotation_of(config: ModelConfig, positions: Int[Array, "B T"]) -> Rotation | None:
    """The rotation at these positions; None if the model has none."""
    return None if config.rope is None else rope_rotation(positions, config.rope, config.head_dim)


def residual(norm: Norm, x: Float[Array, "... D"], block: Block, config: ModelConfig):
    """The residual stream after a block, normalized before the block or after the sum, and the block's second result."""
    before = config.norm_position == "pre"
    update, more = block(norm(x) if before else x)
    x = x + update
    return (x if before else norm(x)), more
