"""Plans for models whose neurons and groups are divided over devices: each keeps the same number of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.selection.plans import PlanTable, groups_kept
from polarjax.selection.routers import Routers
from polarjax.selection.selectors import top_mask
from polarjax.sparsity.activations import Activations
from polarjax.types import Array, Bool, Float, Int

MEASURED = 2048
"""Most validation tokens that groups are assigned by."""
_ROUNDS = 8  # most passes over all pairs of groups


def ranked_by_block(scores: Float[Array, "F"], shards: int) -> Int[Array, "F"]:
    """Indices of all neurons: the best of each of `shards` equal blocks, then the second best of each, and so on.

    The first k are those that a plan for so many shards keeps, if k is a multiple of `shards`. Ties go to the lower
    index.
    """
    blocks = jnp.argsort(-scores.reshape(shards, -1), axis=1, stable=True)
    return (blocks + jnp.arange(shards)[:, None] * blocks.shape[1]).T.ravel()


def with_group_order(activations: Activations, routers: Routers, plans: PlanTable) -> PlanTable:
    """The plans with groups assigned to devices by which are selected together on validation tokens.

    Unchanged if groups are not divided, if every device has a single one, or without validation tokens.

    Args:
      activations: the model's, with router inputs of validation tokens.
      routers: what selects.
      plans: calibrated for a number of shards.
    """
    shards, K = plans.group_shards, plans.num_groups
    if shards in (1, K):
        return plans
    kept = -(-groups_kept(plans.head_density, K) // shards) * shards
    rows = activations.rows("validation")[:MEASURED]
    if not len(rows):
        return plans
    order = []
    for layer in range(plans.num_layers):
        inputs = jax.device_put(activations.router_inputs(rows, slice(layer, layer + 1))[0])
        router = Routers(routers.layers[layer : layer + 1])
        order.append(assign_groups(jax.device_get(_chosen(router, inputs, kept)), shards))
    return dataclasses.replace(plans, order=tuple(order))


@functools.partial(jax.jit, static_argnames="kept")
def _chosen(router: Routers, inputs: Float[Array, "n D"], kept: int) -> Bool[Array, "n K"]:
    return top_mask(router.group_scores(0, inputs), kept)


def assign_groups(chosen: Bool[np.ndarray, "n K"], shards: int) -> tuple[int, ...]:
    """Groups in the order of the devices that get them, K / shards each: device 0's ascending, device 1's, and so on.

    Groups are dealt out by how often they are selected, so that devices are selected evenly; then two groups change
    places as long as that loses fewer of the selected groups: a token's are lost where a device has more than its share.

    Args:
      chosen: the groups that would be selected without devices, the same number for each of n tokens.
      shards: number of devices; divides K.
    """
    K = chosen.shape[1]
    room, share = K // shards, -(-int(chosen[:1].sum()) // shards)
    home, sums = np.full(K, -1), np.zeros(shards)
    for group in np.argsort(-chosen.mean(0), kind="stable"):
        free = np.bincount(home[home >= 0], minlength=shards) < room
        home[group] = int(np.argmin(np.where(free, sums, np.inf)))
        sums[home[group]] += chosen[:, group].mean()
    each = chosen.astype(np.int32)
    counts = np.stack([each[:, home == device].sum(1) for device in range(shards)], 1)
    for _ in range(_ROUNDS):
        if not _swapped(each, home, counts, share):
            break
    return tuple(int(group) for device in range(shards) for group in np.flatnonzero(home == device))


def _swapped(
    chosen: Int[np.ndarray, "n K"],
    home: Int[np.ndarray, "K"],
    counts: Int[np.ndarray, "n shards"],
    share: int,
) -> bool:
    """Swaps pairs of groups in place wherever that loses fewer; whether any was swapped."""
    found = False
    for a in range(len(home)):
        for b in range(a + 1, len(home)):
            one, other = home[a], home[b]
            if one == other:
                continue
            moved = chosen[:, b] - chosen[:, a]
            before = np.minimum(counts[:, one], share) + np.minimum(counts[:, other], share)
            after = np.minimum(counts[:, one] + moved, share) + np.minimum(counts[:, other] - moved, share)
            if after.sum() > before.sum():
                counts[:, one] += moved
                counts[:, other] -= moved
                home[a], home[b] = other, one
                found = True
    return found
