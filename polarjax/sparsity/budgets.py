"""How many groups each layer keeps at the same total, from what skipping in one layer alone does to the output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.model.decoder import Decoder
from polarjax.model.meshes import without_mesh
from polarjax.model.parameters import parameters
from polarjax.model.stacked import StackedDecoder, hidden_states, stack_parameters
from polarjax.progress import task
from polarjax.selection.masking import Masking, StackedRouters
from polarjax.selection.plans import PlanTable, uniform_groups
from polarjax.selection.routers import Routers
from polarjax.sparsity.activations import Activations
from polarjax.sparsity.distillation import divergence
from polarjax.types import Array, Float, Int, Int32

COUNTS = 16
"""Most counts that are measured in a layer; the others are interpolated."""
_WORST = 1e30  # a divergence that isn't finite


MEASURED = 2048
"""Most validation tokens that budgets are measured on, in whole windows."""


def with_budgets(model: Decoder, routers: Routers, activations: Activations, plans: PlanTable) -> PlanTable:
    """The plans with budgets measured on validation windows; unchanged for a model with one group."""
    return dataclasses.replace(
        plans, budgets=measured_budgets(model, routers, activations, plans.dense_layers)
    )


@without_mesh()
def measured_budgets(
    model: Decoder, routers: Routers, activations: Activations, dense_layers: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """`group_budgets` of validation windows; () for a model with one group."""
    if model.config.num_kv_heads == 1:
        return ()
    windows = activations.windows_of("validation", at_least=1)
    return group_budgets(model, routers, windows[: max(1, MEASURED // windows.shape[1])], dense_layers)


def group_budgets(
    model: Decoder, routers: Routers, windows: Int32[np.ndarray, "n T"], dense_layers: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Groups kept in each layer, for every total that `uniform_groups` can have: K rows of L counts.

    Row k - 1 keeps as many groups in all as k in every layer but `dense_layers` do, and minimizes the sum over layers
    of `layer_costs`. Stacking the layers takes a second copy of the model's parameters while it runs.

    Args:
      model: the decoder.
      routers: trained for it.
      windows: full windows of token ids that nothing was learned from.
      dense_layers: layers that the uniform choice keeps dense.
    """
    config, K = model.config, model.config.num_kv_heads
    costs = layer_costs(model, routers, windows)
    uniform = [uniform_groups(config, kept / K, dense_layers=dense_layers) for kept in range(1, K + 1)]
    return allocate(costs, [sum(K if count is None else count for count in counts) for counts in uniform])


def layer_costs(
    model: Decoder, routers: Routers, windows: Int32[np.ndarray, "n T"]
) -> Float[np.ndarray, "L K"]:
    """KL(dense ‖ sparse) of the next token, in nats, if one layer alone keeps k = 1 … K groups."""
    L, K = model.config.num_layers, model.config.num_kv_heads
    stacked = StackedDecoder.of(model.config, stack_parameters(parameters(model)))
    selector, tokens = StackedRouters.of(routers), jax.device_put(windows)
    dense = _hidden(stacked, tokens)
    measured = np.unique(np.linspace(1, K, min(K, COUNTS)).round().astype(int))
    costs = np.zeros((L, len(measured)))
    with task("measure layers", L, "layers") as advance:
        for layer in range(L):
            for i, kept in enumerate(measured[:-1]):  # K groups are the dense model
                counts = np.full((L, len(windows)), K, np.int32)
                counts[layer] = kept
                costs[layer, i] = jax.device_get(_cost(stacked, Masking(selector, counts), tokens, dense))  # pyrefly: ignore[bad-argument-type]
            advance()
    costs = np.where(np.isfinite(costs), costs, _WORST)
    return np.stack([np.interp(np.arange(1, K + 1), measured, row) for row in costs])


def allocate(costs: Float[np.ndarray, "L K"], totals: list[int]) -> tuple[tuple[int, ...], ...]:
    """For each total, the counts (1 to K a layer) with that sum whose summed costs are the smallest; exact."""
    L, K = costs.shape
    best = np.full(L * K + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((L, L * K + 1), int)
    for layer in range(L):
        longer = np.full((K, L * K + 1), np.inf)
        for kept in range(1, K + 1):
            longer[kept - 1, kept:] = best[:-kept] + costs[layer, kept - 1]
        choices[layer], best = longer.argmin(0) + 1, longer.min(0)
    rows = []
    for total in totals:
        counts: list[int] = []
        for layer in range(L - 1, -1, -1):
            counts.append(int(choices[layer, total]))
            total -= counts[-1]
        rows.append(tuple(counts[::-1]))
    return tuple(rows)


@jax.jit
def _hidden(model: StackedDecoder, tokens: Int[Array, "n T"]) -> Float[Array, "n T D"]:
    return hidden_states(model, tokens)[0]


@jax.jit
def _cost(
    model: StackedDecoder, masking: Masking, tokens: Int[Array, "n T"], dense: Float[Array, "n T D"]
) -> Float[Array, ""]:
    return jnp.mean(divergence(model, dense, model, hidden_states(model, tokens, masking=masking)[0]))
