"""`jax.vmap` for a kernel whose thread blocks wait for each other, so that two calls must never run at once."""

from collections.abc import Callable, Mapping

import jax
from jax import lax
from jax.custom_batching import custom_vmap

type Weights = Mapping[str, jax.Array]
type Mlp = Callable[[jax.Array, jax.Array, Weights], jax.Array]


def batchable(call: Mlp) -> Mlp:
    """Lets `jax.vmap` map `call(x [B D], index [k], weights) -> [B D]` over any of its arrays.

    Mapped over x alone, it stays one call with more rows; otherwise the calls run one after the other.
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
