"""Checks that routers and plans belong to the weights that they are saved beside or used with."""

from pathlib import Path

from polarjax.configs import ModelConfig
from polarjax.errors import SparsityError
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import Routers
from polarjax.storage.fingerprint import same_weights, short

KEEP_OR_DROP = (
    "learn them again for this model (polarjax sparsify); keep them all the same with "
    "bundle.with_model(model, keep_sparsity=True); or leave them out with bundle.with_model(model)"
)
ONE_TRAINING = "calibrate again (polarjax calibrate), or take routers and plans of one training"


def check_shape(part: Routers | PlanTable, config: ModelConfig, *, where: Path, hint: str) -> None:
    """Raises `SparsityError` unless routers or plans fit the shape of the model in a directory."""
    try:
        part.check(config)
    except SparsityError as error:
        got, expected = error.got, error.expected
        raise SparsityError(error.what, where=where, got=got, expected=expected, hint=hint) from error


def check_weights(
    part: Routers | PlanTable, weights: str, *, made_for: str = "", where: object, hint: str
) -> None:
    """Raises `SparsityError` if routers or plans were made for other weights than those with this fingerprint.

    `made_for` counts for parts that don't know their weights.
    """
    made_for = part.weights or made_for
    if not same_weights(made_for, weights):
        raise SparsityError(
            f"the {'routers' if isinstance(part, Routers) else 'plans'} are for other weights than the model's",
            where=where,
            got=f"weights {short(made_for)}",
            expected=short(weights),
            hint=hint,
        )


def check_routers_of_plans(plans: PlanTable, routers: str, *, where: object, hint: str) -> None:
    """Raises `SparsityError` if the plans were calibrated for other routers than those with this fingerprint."""
    if not same_weights(plans.routers, routers):
        raise SparsityError(
            "the plans were calibrated for other routers",
            where=where,
            got=f"routers {short(plans.routers)}",
            expected=short(routers),
            hint=hint,
        )
