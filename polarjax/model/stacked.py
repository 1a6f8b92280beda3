"""A decoder whose layers are stacked: one layer is compiled and scanned, so compile time does not grow with L."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from polarjax.configs import ModelConfig
from polarjax.model.decoder import Layer, attention_half, mlp_half, prompt_start
from polarjax.model.mlp import usage
from polarjax.model.parameters import with_parameters
from polarjax.selection.masking import Masking
from polarjax.types import Array, Float, Int

_LAYERS = "layers."


def stack_parameters(flat: dict[str, Array]) -> dict[str, Array]:
    """Parameters by dotted path -> the same with `layers.attn.wq` [L ...] in place of `layers.0.attn.wq` and so on."""
    return dict(stacked_parameters(flat))


def stacked_parameters(flat: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yields what `stack_parameters` returns one by one, so that few need be in memory twice."""
    layers: dict[str, list[Array]] = {}
    for name, value in flat.items():
        if name.startswith(_LAYERS):
            layers.setdefault(_LAYERS + name.split(".", 2)[2], []).append(value)
        else:
            yield name, value
    for name, values in layers.items():
        yield name, _stack(values)


@jax.jit
def _stack(values: list[Array]) -> Array:
    """In one program, because `jnp.stack` alone copies each array first."""
    return jnp.stack(values)


def unstack_parameters(stacked: dict[str, Array], num_layers: int) -> dict[str, Array]:
    """The inverse of `stack_parameters`."""
    flat: dict[str, Array] = {}
    for name, value in stacked.items():
        if name.startswith(_LAYERS):
            flat |= {f"{_LAYERS}{i}.{name.removeprefix(_LAYERS)}": value[i] for i in range(num_layers)}
        else:
            flat[name] = value
    return flat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StackedDecoder:
    """A decoder with one `Layer` whose parameters are [L ...]; the other parts are those of `Decoder`."""

    embed: Any
    layers: Layer
    final_norm: Any
    head: Any
    config: ModelConfig = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, config: ModelConfig, stacked: dict[str, Array]) -> "StackedDecoder":
        """The decoder with parameters as `stack_parameters` names them."""
        one = dataclasses.replace(config, num_layers=1, sliding_window=None)
        named = {
            f"{_LAYERS}0.{name.removeprefix(_LAYERS)}" if name.startswith(_LAYERS) else name: value
            for name, value in stacked.items()
        }
        model = with_parameters(one, named, check=False)
        return cls(model.embed, model.layers[0], model.final_norm, model.head, config)


class Records(NamedTuple):
    """What routers learn from: their inputs [L B T D], and the importance of each group, float32 [L B T K]; and the two
    values of `polarjax.model.mlp.usage`, averaged over the tokens."""

    inputs: Float[Array, "L B T D"]
    importance: Float[Array, "L B T K"]
    active: Float[Array, "L"]
    l1: Float[Array, "L"]


def hidden_states(
    model: StackedDecoder, tokens: Int[Array, "B T"], *, masking: Masking | None = None, remat: bool = False
) -> tuple[Float[Array, "B T D"], Records]:
    """The last layer's output over full windows, and what routers learn from.

    Args:
      model: the decoder.
      tokens: int32 [B T], all valid.
      masking: what to skip, with a selector that takes traced layer numbers; None is the dense model.
      remat: compute each layer again in the backward pass instead of keeping what is inside it.
    """
    config = model.config
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    x, rotation = prompt_start(model, tokens, lengths)

    def run(x: Array, layer: Layer, i: Any, window: int | None) -> tuple[Array, Records]:
        x, (inputs, norms, *_) = attention_half(layer, i, x, lengths, rotation, config, masking, window)
        x, (_, pre, _) = mlp_half(layer, i, x, inputs, config, masking)
        active, l1 = usage(pre, config)
        return x, Records(inputs, norms, jnp.mean(active), jnp.mean(l1))

    run = jax.checkpoint(run, static_argnums=(3,)) if remat else run
    windows = [config.window(i) for i in range(config.num_layers)]
    if len(set(windows)) == 1:
        step = lambda x, pair: run(x, pair[0], pair[1], windows[0])
        return jax.lax.scan(step, x, (model.layers, jnp.arange(config.num_layers)))
    records = []
    for i, window in enumerate(windows):
        x, record = run(x, jax.tree.map(lambda leaf, i=i: leaf[i], model.layers), i, window)
        records.append(record)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)
