"""A decoder's parameters keyed by dotted path, and a decoder made from them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError
from polarjax.model.decoder import Decoder
from polarjax.model.layout import Layout
from polarjax.storage.fingerprint import fingerprint_of
from polarjax.types import Array


def abstract(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Decoder:
    """A decoder of `jax.ShapeDtypeStruct`s: the shapes of all parameters, without memory."""
    return Decoder(config, rngs=None, dtype=dtype)


def parameters(model: Decoder) -> dict[str, Array]:
    """The parameters, keyed by dotted path, for example `layers.0.attn.wq`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {_dotted(path): leaf for path, leaf in leaves}


def fingerprint(model: Decoder) -> str:
    """Identifies the weights; a model and a cast of it match. See `polarjax.storage.fingerprint`."""
    return fingerprint_of(parameters(model))


def _dotted(path: tuple) -> str:
    names = (getattr(entry, "name", getattr(entry, "idx", None)) for entry in path[:-1])
    return ".".join(map(str, names))


def with_parameters(
    config: ModelConfig, flat: Mapping[str, Array], *, check: bool = True, layout: Layout | None = None
) -> Decoder:
    """The decoder with the parameters `flat` (named as in `parameters`); `check=False` takes any shapes.

    `layout` says where they lie; it places nothing.

    Raises:
      CheckpointError: a parameter is missing, unknown, or of the wrong shape.
    """
    empty = abstract(config)
    empty.layout = layout
    expected = parameters(empty)
    wrong = sorted(expected.keys() ^ flat.keys())
    if check:
        wrong += [name for name in expected if name in flat and expected[name].shape != flat[name].shape]
    if wrong:
        raise CheckpointError(
            "parameters are missing, unknown or of the wrong shape",
            where="decoder parameters",
            got=", ".join(wrong[:10]),
            expected=f"the {len(expected)} parameters of this config",
            hint="use the config that belongs to these parameters",
        )
    return jax.tree.unflatten(jax.tree.structure(empty), [flat[name] for name in expected])
