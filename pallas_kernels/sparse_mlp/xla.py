"""Selective MLP in plain JAX: gathers the named rows, then multiplies. Runs on every device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

ACTIVATIONS = {
    "relu": lambda a: jnp.maximum(a, 0),
    "silu": jax.nn.silu,
    "gelu": lambda a: jax.nn.gelu(a, approximate=False),
}


def activation_function(activation: str, threshold: float) -> Callable[[jax.Array], jax.Array]:
    """The function of that name; with a threshold above 0, "relu" is `thresholded`."""
    return thresholded(threshold) if threshold else ACTIVATIONS[activation]


def thresholded(threshold: float) -> Callable[[jax.Array], jax.Array]:
    """float32 -> float32: a where it exceeds the threshold, else 0."""
    return lambda a: jnp.where(a > np.float32(threshold), a, jnp.float32(0))


def sparse_mlp(
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
    """See `pallas_kernels.sparse_mlp`. Absent entries read row 0, which is then replaced by zeros."""
    num_neurons = w_up.shape[0]
    present = (index >= 0) & (index < num_neurons)
    rows = jnp.where(present, index, 0)
    act = activation_function(activation, threshold)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def contract(axes, a, b):
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32, precision=precision)

    def take(w):  # [F ...] -> [k ...], zeros where absent
        taken = w.at[rows].get(mode="promise_in_bounds")
        return jnp.where(present.reshape((-1,) + (1,) * (w.ndim - 1)), taken, 0)

    def project(w, b):  # -> [B k] float32
        out = contract("bd,kd->bk", x, take(w))
        return out if b is None else out + take(b).astype(jnp.float32)[None, :]

    up = project(w_up, b_up)
    hidden = act(up) if w_gate is None else act(project(w_gate, b_gate)) * up
    out = contract("bk,kd->bd", hidden.astype(x.dtype), take(w_down))
    return out.astype(x.dtype)
