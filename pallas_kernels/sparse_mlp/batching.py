"""`jax.vmap` of a call whose thread blocks wait for one another, and so must not share a launch with other calls."""

from collections.abc import Callable, Mapping

import jax
from jax import lax
from jax.custom_batching import custom_vmap

type Weights = Mapping[str, jax.Array]
type Call = Callable[[jax.Array, jax.Array, Weights], jax.Array]


def batchable(call: Call) -> Call:
    """`call(x [B D], index [k], weights) -> [B D]`, that `jax.vmap` may map over any of its arrays.

    Mapped over x alone it stays one call, of as many rows more; otherwise the calls run one after the other.
    """
    mappable = custom_vmap(call)

    @mappable.def_vmap
    def _(size: int, mapped, x: jax.Array, index: jax.Array, weights: Weights):
        if not any(jax.tree.leaves(mapped[1:])):
            rows, width = x.shape[1:]
            return mappable(x.reshape(size * rows, width), index, weights).reshape(size, rows, width), True
        given, tree = jax.tree.flatten((x, index, weights))
        varies = jax.tree.leaves(mapped)

        def one(own: list[jax.Array]) -> jax.Array:
            rest = iter(own)
            return mappable(
                *tree.unflatten(next(rest) if v else g for v, g in zip(varies, given, strict=True))
            )

        return lax.map(one, [g for v, g in zip(varies, given, strict=True) if v]), True

    return mappable
