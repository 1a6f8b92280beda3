"""The bundled model after `polarjax tune --train out`, kept as a file of what that changed."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from polarjax.model.decoder import Decoder
from polarjax.model.parameters import fingerprint, parameters, with_parameters
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.types import Array

FILE = Path(__file__).parents[1] / "assets" / "opt-6m-healed.npz"
STEPS = 16
"""Steps of a stored weight per standard deviation of its group's; they reach 127 steps either way."""
_OUT, _BIAS = "attn.wo", "attn.bo"
_FIELDS = ("w_group", "b_group", "mean")


def pack(model: Decoder, routers: Routers) -> dict[str, np.ndarray]:
    """What is stored of a healed model: output projections as int8, biases and group routers as bits of bfloat16."""
    flat, count = parameters(model), model.config.num_layers
    out = np.stack([np.asarray(flat[f"layers.{i}.{_OUT}"], np.float32) for i in range(count)])
    step = out.std((2, 3, 4), keepdims=True) / STEPS
    stored = {"out": np.clip(np.rint(out / step), -127, 127).astype(np.int8), "step": step}
    stored["bias"] = _bits([flat[f"layers.{i}.{_BIAS}"] for i in range(count)])
    return stored | {name: _bits([getattr(layer, name) for layer in routers.layers]) for name in _FIELDS}


def healed(plain: Decoder, file: Path = FILE) -> tuple[Decoder, Routers]:
    """The bundled model with what healing changed, and the group routers that learned along with it."""
    with np.load(file) as stored:
        out = stored["out"] * stored["step"]
        values = {name: _values(stored[name]) for name in ("bias", *_FIELDS)}
    dtype, flat = plain.dtype, dict(parameters(plain))
    for i, (weights, bias) in enumerate(zip(out, values["bias"], strict=True)):
        flat[f"layers.{i}.{_OUT}"] = jnp.asarray(weights, jnp.bfloat16).astype(dtype)
        flat[f"layers.{i}.{_BIAS}"] = bias.astype(dtype)
    model = with_parameters(plain.config, flat)
    fields = [{name: values[name][i].astype(dtype) for name in _FIELDS} for i in range(len(out))]
    layers = tuple(LayerRouter(w_in=None, w_out=None, **each) for each in fields)
    return model, Routers(layers, weights=fingerprint(model), importance="contributions")


def _bits(arrays: list[Array]) -> np.ndarray:
    return np.stack([np.asarray(each.astype(jnp.bfloat16)) for each in arrays]).view(np.uint16)


def _values(bits: np.ndarray) -> Array:
    return jnp.asarray(bits.view(jnp.bfloat16))
