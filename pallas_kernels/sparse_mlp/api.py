"""The MLP of one layer over the selected neurons only."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels._device import Device, require_hopper, require_static_shapes
from pallas_kernels._dispatch import dispatch
from pallas_kernels.sparse_mlp import xla
from pallas_kernels.sparse_mlp.batching import Weights, batchable
from pallas_kernels.sparse_mlp.choice import OP, measured


def sparse_mlp(
    x: Float[Array, "B D"],
    w_up: Float[Array, "F D"],
    w_down: Float[Array, "F D"],
    index: Int[Array, " k"],
    *,
    w_gate: Float[Array, "F D"] | None = None,
    b_up: Float[Array, " F"] | None = None,
    b_gate: Float[Array, " F"] | None = None,
    activation: str = "relu",
    threshold: float = 0.0,
    implementation: str | None = None,
) -> Float[Array, "B D"]:
    """Sum over the neurons j in `index` of act(x·w_up[j] + b_up[j]) times w_down[j].

    With `w_gate` the hidden value is act(x·w_gate[j] + b_gate[j]) · (x·w_up[j] + b_up[j]). The caller adds the bias
    of the down-projection. `index` may be in any order. An entry outside [0, F), -1 by convention, is absent and
    contributes exact zeros; a neuron counts as many times as it is named. Rows that are not named have no influence,
    whatever they hold. That is why even full density does not switch to dense products, where NaN in a row of w_down
    would spread as 0 · NaN: computing a layer densely is up to the caller.

    Args:
      x: any floating dtype; the result has the same. Products accumulate in float32; hidden values are rounded to
        x's dtype. For bfloat16, "mosaic" also rounds the few partial sums that it adds up, in float32, to the result.
      w_up, w_down, w_gate: neuron-major (row j belongs to neuron j), all of one floating dtype.
      index: any signed integer dtype.
      b_up, b_gate: floating; b_gate only together with w_gate.
      activation: "relu", "silu" or "gelu" (the exact one).
      threshold: static, with "relu" only: act(a) is a where a exceeds it, else 0. The comparison is in float32, before
        hidden values are rounded. 0 is the plain ReLU.
      implementation: "mosaic" (Pallas on Hopper GPUs; bfloat16 and float16, D a multiple of 128, no "gelu", no
        derivative), "xla" (anywhere), or None for the best one that can do the call; `record_backends` shows which
        one ran.

    Raises:
      ValueError: a shape, dtype, name or threshold does not fit.
      NotImplementedError: the named implementation cannot do the call.
    """
    x, w_up, w_down, index = (jnp.asarray(a) for a in (x, w_up, w_down, index))
    w_gate, b_up, b_gate = (None if a is None else jnp.asarray(a) for a in (w_gate, b_up, b_gate))
    _validate(x, w_up, w_down, index, (w_gate, b_up, b_gate), activation)
    threshold = _static_threshold(threshold, activation)
    index = index.astype(jnp.int32)  # a narrow dtype may not hold F
    optional = {"w_gate": w_gate, "b_up": b_up, "b_gate": b_gate}
    weights = {"w_up": w_up, "w_down": w_down} | {n: a for n, a in optional.items() if a is not None}
    act = {"activation": activation, "threshold": threshold}
    backends = {
        "mosaic": lambda device: _hopper(x, index, weights, device=device, **act),
        "xla": lambda _: xla.sparse_mlp(x, index=index, **weights, **act),
    }
    return dispatch(OP, implementation, backends, x, w_up)


def _hopper(x: Array, index: Array, weights: Weights, *, device: Device, **act: Any) -> Array:
    """Runs the Hopper kernel with the measured tiles; works under vmap."""
    require_hopper(device)
    require_static_shapes(x, weights["w_up"], index)
    from pallas_kernels.sparse_mlp.mosaic import launch  # takes half a second; CPUs don't need it

    def call(x: Array, index: Array, weights: Weights) -> Array:
        batch, d_model = x.shape
        like = {"selected": index.shape[0], "gated": "w_gate" in weights, "dtype": x.dtype.name}
        tiles = measured(batch, d_model, device, **like)
        return launch.sparse_mlp(x, index=index, **weights, tiles=tiles, device=device, **act)

    return batchable(call)(x, index, weights)


def _validate(
    x: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    index: jax.Array,
    optional: tuple[jax.Array | None, jax.Array | None, jax.Array | None],
    activation: str,
) -> None:
    if x.ndim != 2 or 0 in x.shape:
        _fail("x must be [B D]", list(x.shape), "2 axes, none empty")
    if w_up.ndim != 2 or w_up.shape[1] != x.shape[1] or 0 in w_up.shape:
        _fail("w_up must be [F D], neuron-major", list(w_up.shape), ["F", x.shape[1]])
    w_gate, b_up, b_gate = optional
    shapes = (("w_down", w_down, w_up.shape), ("w_gate", w_gate, w_up.shape))
    shapes += (("b_up", b_up, w_up.shape[:1]), ("b_gate", b_gate, w_up.shape[:1]))
    for name, array, shape in shapes:
        if array is not None and array.shape != shape:
            _fail(f"{name} doesn't fit w_up", list(array.shape), list(shape))
    for name, array in (("x", x), ("w_up", w_up), *((name, array) for name, array, _ in shapes)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            _fail(f"{name} must be floating", array.dtype, "a floating dtype")
    for name, array in (("w_down", w_down), ("w_gate", w_gate)):
        if array is not None and array.dtype != w_up.dtype:
            _fail(f"{name} must have w_up's dtype", array.dtype, w_up.dtype)
    if index.ndim != 1 or index.shape[0] < 1 or not jnp.issubdtype(index.dtype, jnp.signedinteger):
        _fail("index must be signed integers [k]", f"{index.dtype}{list(index.shape)}", "int32[k], k > 0")
    if b_gate is not None and w_gate is None:
        _fail("b_gate without w_gate", "b_gate", "both or neither")
    if activation not in xla.ACTIVATIONS:
        _fail("unknown activation", repr(activation), ", ".join(map(repr, xla.ACTIVATIONS)))


def _static_threshold(threshold: object, activation: str) -> float:
    """The threshold as a Python float; accepts any kind of static number."""
    expected = "a static number, zero or more, finite in float32"
    try:
        value = float("nan" if isinstance(threshold, str | bool) else threshold)  # pyrefly: ignore[bad-argument-type]
    except (TypeError, ValueError):  # traced values raise a TypeError
        _fail("unusable threshold", repr(threshold), expected)
    if not 0 <= value <= float(np.finfo(np.float32).max):
        _fail("unusable threshold", repr(threshold), expected)
    if value and activation != "relu":
        _fail("a threshold needs activation relu", f"{value} with {activation!r}", "threshold 0")
    return value + 0.0  # -0.0 is 0


def _fail(what: str, got: object, expected: object) -> NoReturn:
    raise ValueError(f"{OP}: {what}; got {got}, expected {expected}")
