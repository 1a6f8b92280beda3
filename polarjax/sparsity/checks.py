"""Checks that activations, routers and plans belong to one model, and of the options of learning."""

from typing import Any, get_args

from polarjax.checkpoint.belonging import check_routers_of_plans, check_weights
from polarjax.configs import ModelConfig
from polarjax.errors import InputError, SparsityError
from polarjax.numeric import check_type, items, plain, shown
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import Routers
from polarjax.sparsity.activations import Activations
from polarjax.sparsity.options import HELD_OUT, Budgets


def check_options[T](options: Any, kind: type[T], name: str) -> T:
    """The options, or the defaults for None; raises `InputError` if they are of another type."""
    return (
        kind()
        if options is None
        else check_type(options, kind, where=name, hint=f"pass {kind.__name__}(...)")
    )


def diverged(where: str, got: str) -> SparsityError:
    """The error for routers whose loss isn't finite."""
    hint = "lower the learning rate, or check the model with generate"
    what = "training diverged or the activations are not finite"
    return SparsityError(what, where=where, got=got, hint=hint)


def check_sources(activations: Any, config: Any, where: str) -> None:
    """Raises `InputError` unless these are activations and a model configuration."""
    hint = "pass what polarjax.sparsity.collect returned"
    check_type(activations, Activations, where=where, hint=hint)
    check_type(config, ModelConfig, where=where, hint="pass model.config")


def check_size(max_bytes: Any) -> None:
    """Raises `InputError` unless `max_bytes` is a number."""
    number = plain(max_bytes)
    if type(number) not in (int, float) or number != number:
        raise InputError(
            "not a size", where="max_bytes", got=shown(number), expected="bytes", hint="pass 10**9"
        )


def check_budgets(budgets: Any, where: str) -> Budgets:
    """The value; raises `InputError` if it is not one of `Budgets`."""
    if budgets not in get_args(Budgets):
        expected, hint = " | ".join(get_args(Budgets)), "leave it out to keep equally many in every layer"
        raise InputError("no such budgets", where=where, got=str(budgets)[:80], expected=expected, hint=hint)
    return budgets


def check_gated(config: ModelConfig) -> None:
    """Raises `SparsityError` if the neurons of a model are learned by their activity."""
    if config.neuron_sparsity:
        raise SparsityError(
            "the neurons of a ReLU model are learned by which are active, always",
            where="neurons",
            got="gated",
            expected="a model with another activation",
            hint="leave it out (--neurons relu)",
        )


def check_held_out(held_out: Any) -> None:
    """Raises `InputError` unless `held_out` is two fractions whose sum is below 1."""
    fractions = items(held_out) or ()
    numbers = len(fractions) == 2 and all(type(each) in (int, float) for each in fractions)
    if not (numbers and min(fractions) >= 0 and sum(fractions) < 1):  # so that NaN fails
        raise InputError(
            "unusable fractions of held-out text",
            where="held_out",
            got=repr(held_out)[:80],
            expected="two fractions, not negative, whose sum is below 1",
            hint=f"pass for example {HELD_OUT}",
        )


def check_routers(routers: Routers, activations: Activations, config: ModelConfig) -> None:
    """Raises `SparsityError` unless routers and activations are from the same weights, with this config."""
    check_sources(activations, config, "calibration")
    check_type(routers, Routers, where="calibration", hint="pass the routers that train_routers returned")
    routers.check(config)
    activations.check(config)
    hint = "use activations of the model that the routers were trained on, or train the routers again"
    check_weights(routers, activations.fingerprint, where="calibration", hint=hint)


def check_plans(table: PlanTable, routers: Routers, activations: Activations) -> None:
    """Raises `SparsityError` unless plans, routers and activations are from the same weights and the same training."""
    check_routers(routers, activations, activations.config)
    table.check(activations.config)
    hint = "calibrate again with these routers: polarjax calibrate"
    check_routers_of_plans(table, routers.fingerprint, where="calibration", hint=hint)
