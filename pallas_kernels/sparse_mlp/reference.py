"""Float32 oracle of the selective MLP: computes every neuron, then masks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_ACTIVATIONS = {
    "relu": lambda a: jnp.where(a > 0, a, a * 0.0),
    "silu": lambda a: a / (1.0 + jnp.exp(-a)),
    "gelu": lambda a: 0.5 * a * (1.0 + jax.lax.erf(a / jnp.sqrt(2.0))),
}


def _thresholded(threshold: float) -> Callable[[jax.Array], jax.Array]:
    return lambda a: jnp.where(a > np.float32(threshold), a, 0.0)


def reference(
    x: Float[Array, "B D"],
    w_up: Float[Array, "F D"],
    w_down: Float[Array, "F D"],
    index: Int[Array, " k"],
    *,
    w_gate: Float[Array, "F D"] | None = None,
    b_up: Float[Array, " F"] | None = None,
    b_gate: Float[Array, " F"] | None = None,
    activation: str,
    threshold: float = 0.0,
) -> Float[Array, "B D"]:
    """Dense MLP in float32 in which neuron j counts as many times as `index` names it; returns float32 [B D].

    Rows that `index` does not name are replaced by zeros before use, so NaN in them has no effect.
    """
    neurons = jnp.arange(w_up.shape[0])
    count = jnp.sum(index[None, :] == neurons[:, None], axis=1)  # [F]
    named = count > 0
    act = _thresholded(threshold) if threshold else _ACTIVATIONS[activation]

    def project(w, b):
        w = jnp.where(named[:, None], w.astype(jnp.float32), 0.0)
        b = 0.0 if b is None else jnp.where(named, b.astype(jnp.float32), 0.0)[None, :]
        return jnp.einsum("bd,fd->bf", x.astype(jnp.float32), w, precision="highest") + b

    up = project(w_up, b_up)  # [B F]
    hidden = act(up) if w_gate is None else act(project(w_gate, b_gate)) * up
    hidden = jnp.where(named[None, :], hidden * count[None, :], 0.0)
    down = jnp.where(named[:, None], w_down.astype(jnp.float32), 0.0)
    return jnp.einsum("bf,fd->bd", hidden, down, precision="highest")
