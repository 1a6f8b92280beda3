"""Checks of what the stages of learning get: activations, routers and plans of one model."""

from polarjax.checkpoint.belonging import check_routers_of_plans, check_weights
from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import Routers
from polarjax.sparsity.activations import Activations


def check_batch_size(batch_size: int) -> None:
    """Raises `InputError` unless a forward pass takes at least one window."""
    if not batch_size >= 1:
        raise InputError("no batch", where="batch_size", got=batch_size, expected="at least 1", hint="pass 8")


def check_routers(routers: Routers, activations: Activations, config: ModelConfig) -> None:
    """Raises `SparsityError` unless routers and activations are of one model of this config, weights included."""
    routers.check(config)
    activations.check(config)
    hint = "take activations of the model that the routers were trained on, or train them again"
    check_weights(routers, activations.fingerprint, where="calibration", hint=hint)


def check_plans(table: PlanTable, routers: Routers, activations: Activations) -> None:
    """Raises `SparsityError` unless plans, routers and activations are of one model and one training."""
    check_routers(routers, activations, activations.config)
    table.check(activations.config)
    hint = "calibrate again with these routers: polarjax calibrate"
    check_routers_of_plans(table, routers.fingerprint, where="calibration", hint=hint)
