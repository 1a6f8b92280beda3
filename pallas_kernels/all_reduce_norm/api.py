"""Ends half a layer on several GPUs: sums what they computed, adds it to the residual stream, and normalizes."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pallas_kernels._device import Device, require_hopper, require_static_shapes
from pallas_kernels._dispatch import dispatch
from pallas_kernels.all_reduce_norm.problem import Kind, Link, Problem, check_mesh, check_sizes, stride, words

OP = "all_reduce_norm"


def connect(
    after: Array, mesh: Mesh, axis: str, *, rows: int, width: int, implementation: str | None = None
) -> Link:
    """What `all_reduce_norm` needs to sum [rows width] over a mesh axis; once a step, inside `jax.shard_map`.

    Args:
      after: an array that is ready only when this device has made all sums with earlier links, such as a step's token.
      mesh: GPUs of one process, all of its axes manual.
      axis: the mesh axis that sums go over.
      rows, width: shape of what is summed.
      implementation: "mosaic" (Pallas, Hopper GPUs), the only one there is, or None for the same.

    Raises:
      NotImplementedError: the kernel can't sum this here; `jax.lax.psum` can.
    """
    devices = mesh.shape[axis]

    def hopper(device: Device) -> Link:
        require_hopper(device)
        require_static_shapes(after)
        check_sizes(rows, width, devices)
        check_mesh(mesh)
        from pallas_kernels.all_reduce_norm import mosaic  # takes half a second; CPUs don't need it

        apart = stride(mesh, axis)
        return mosaic.connect(after, elements=rows * width, devices=devices, stride=apart)

    return dispatch(OP, implementation, {"mosaic": hopper}, after)


def all_reduce_norm(
    update: Float[Array, "*S B D"],
    x: Float[Array, "B D"],
    scale: Float[Array, "D"],
    link: Link,
    number: int,
    *,
    bias: Float[Array, "D"] | None = None,
    shift: Float[Array, "D"] | None = None,
    kind: Kind,
    eps: float,
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """y = x + the sum of `update` over the devices + `bias`, and norm(y) * scale + shift.

    Sums and norm are computed in float32, the sum in the order of the devices, so that all get the same; y is rounded
    to bfloat16 before it is normalized. All devices of the link must call it equally often, in the same order.

    Args:
      update: this device's part of the sum, bfloat16 [B D], or float32 [S B D] that add up to it.
      x: the residual stream, bfloat16.
      scale, shift: the norm's weight and bias, bfloat16 [D]; no shift adds nothing.
      link: from `connect`, for as many rows of this width.
      number: which sum this is since `connect`: 1, 2, 3 and so on; a Python int.
      bias: bfloat16 [D], added once to the sum; None adds nothing.
      kind: "rms", or "layer", which subtracts the row's mean first.
      eps: added to the mean square.

    Raises:
      ValueError: a shape or dtype doesn't fit, or the link is too small.
    """
    vectors = [each for each in (scale, bias, shift) if each is not None]
    _validate(update, x, vectors, link)
    from pallas_kernels.all_reduce_norm import mosaic

    rows, width = x.shape
    summands = update.shape[0] if update.ndim == 3 else 0
    given = bias is not None, shift is not None
    problem = Problem(rows, width, link.devices, kind, eps, *given, summands)
    with jax.named_scope(f"{OP}.mosaic"):
        mark = jnp.full((1,), number, jnp.int32)
        return mosaic.all_reduce_norm(update, x, *vectors, link=link, number=mark, problem=problem)


def _validate(update: Array, x: Array, vectors: list[Array], link: Link) -> None:
    if x.ndim != 2 or update.shape[-2:] != x.shape or update.ndim > 3:
        raise ValueError(f"{OP}: update and x must be [B D]; got {list(update.shape)} and {list(x.shape)}")
    if update.dtype != (jnp.float32 if update.ndim == 3 else jnp.bfloat16):
        raise ValueError(f"{OP}: update must be bfloat16, or float32 with summands; got {update.dtype}")
    for each in (x, *vectors):
        if each.dtype != jnp.bfloat16:
            raise ValueError(f"{OP}: x, scale, bias and shift must be bfloat16; got {each.dtype}")
    for each in vectors:
        if each.shape != x.shape[1:]:
            raise ValueError(
                f"{OP}: scale, bias and shift must be [D]; got {list(each.shape)}, D {x.shape[1]}"
            )
    needed = words(x.size, link.devices)
    if link.memory.size < needed:
        raise ValueError(f"{OP}: the link has {link.memory.size} words of memory; this sum needs {needed}")
