"""How much of an MLP's output remains if only some of its neurons are kept."""

import jax
import jax.numpy as jnp

from polarjax.model.mlp import Mlp
from polarjax.sparsity.shards import ranked_by_block
from polarjax.types import Array, Float, Int


def importance(layer: Mlp, hidden: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """How much each neuron adds to the output: |activation(gate) · up| · ‖down row‖, float32.

    Args:
      layer: the MLP.
      hidden: the neurons' outputs, activation(gate) · up (without a gate: activation(up)).
    """
    norms = jnp.linalg.norm(layer.w_down[...].astype(jnp.float32), axis=1)
    return jnp.abs(hidden.astype(jnp.float32)) * jnp.expand_dims(norms, range(hidden.ndim - 1))


def kept_share(
    layer: Mlp,
    hidden: Float[Array, "B F"],
    scores: Float[Array, "F"],
    counts: Int[Array, "c"],
    shards: int = 1,
) -> Float[Array, "c"]:
    """Share of the MLP output's norm that remains if a batch keeps the k neurons with the largest `scores`.

    With y = Σ_j h_j w_j over all neurons (h_j = activation(gate)_j · up_j, w_j the row of the down-projection, no
    bias) and m the same sum over the skipped ones, a token's share is 1 - ‖m‖ / ‖y‖: 1 if nothing is lost, 0 if the
    error is as large as the output. It is averaged over the batch's tokens; a token whose output is 0 counts as 1.

    Args:
      layer: the MLP.
      hidden: h of the batch's tokens.
      scores: what ranks neurons for the whole batch; ties go to the lower index.
      counts: k, several.
      shards: equal blocks of neurons, each of which keeps its best k / shards.
    """
    hidden, down = hidden.astype(jnp.float32), layer.w_down[...].astype(jnp.float32)
    rank = jnp.argsort(ranked_by_block(scores, shards), stable=True)
    whole = jnp.linalg.norm(hidden @ down, axis=-1)

    def of(k: Array) -> Array:
        missing = jnp.linalg.norm(jnp.where((rank < k)[None], 0, hidden) @ down, axis=-1)
        return jnp.mean(jnp.where(whole > 0, 1 - missing / jnp.where(whole > 0, whole, 1), 1))

    return jax.lax.map(of, counts)
