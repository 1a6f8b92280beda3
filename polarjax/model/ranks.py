"""The largest numbers of a row, found on a GPU without sorting."""

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.types import Array, Float, Int, UInt32

_SIGN = np.uint32(1 << 31)


def ranks(values: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers ordered like the float32 `values`; above 0, unless all bits of a value are ones (a NaN)."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)


def values_of(found: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The inverse of `ranks`."""
    return jax.lax.bitcast_convert_type(jnp.where(found >= _SIGN, found ^ _SIGN, ~found), jnp.float32)


def largest_of(rows: Float[Array, "B v"], n: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """`jax.lax.top_k` of float32."""
    by_sorting = lambda rows: tuple(jax.lax.top_k(rows, n))
    return jax.lax.platform_dependent(rows, cuda=lambda rows: one_by_one(rows, n), default=by_sorting)


def one_by_one(rows: Float[Array, "B v"], n: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """`jax.lax.top_k` of float32, without sorting.

    On a GPU, a step whose conditional has a sort in a branch, taken or not, is no longer one CUDA graph (as far as we
    can tell, because CUB sorts): the host decides, and waits for the device at every step.
    """
    if not n:  # nothing to concatenate
        return tuple(jax.lax.top_k(rows, 0))
    left, ids = ranks(rows), []
    column = jnp.arange(rows.shape[1], dtype=jnp.int32)[None]
    for _ in range(n):
        ids.append(jnp.argmax(left, -1, keepdims=True).astype(jnp.int32))
        left = jnp.where(column == ids[-1], 0, left)
    found = jnp.concatenate(ids, -1)
    return jnp.take_along_axis(rows, found, 1), found
