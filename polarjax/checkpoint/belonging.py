"""Checks that routers and plans belong to the weights they are stored or used with.

Fingerprints sample large arrays (`polarjax.storage.fingerprint`), so a change outside the sample is not detected. Parts
without a fingerprint, from an earlier version, pass."""

from pathlib import Path
from typing import Any

from polarjax.configs import ModelConfig
from polarjax.errors import SparsityError
from polarjax.model.checks import check_model
from polarjax.numeric import check_type
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import Routers
from polarjax.storage.fingerprint import same_weights, short
from polarjax.text.tokenizer import Tokenizer

KEEP_OR_DROP = (
    "retrain them for this model (polarjax sparsify), keep them anyway with "
    "bundle.with_model(model, keep_sparsity=True), or drop them with bundle.with_model(model)"
)
ONE_TRAINING = "calibrate again (polarjax calibrate), or use routers and plans of one training run"


def check_parts(model: Any, tokenizer: Any, routers: Any, plans: Any) -> None:
    """Raises `InputError` unless every part of a bundle is of its type, or None where it may be."""
    check_model(model, where="Bundle")
    for name, kind, part in (
        ("tokenizer", Tokenizer, tokenizer),
        ("routers", Routers, routers),
        ("plans", PlanTable, plans),
    ):
        if part is not None:
            check_type(part, kind, where=f"Bundle.{name}", hint="pass one that pj.load gives, or None")


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
    """Raises `SparsityError` if routers or plans were made for weights with a fingerprint other than `weights`.

    `made_for` is the fingerprint for parts that don't record their own.
    """
    made_for = part.weights or made_for
    if not same_weights(made_for, weights):
        raise SparsityError(
            f"the {'routers' if isinstance(part, Routers) else 'plans'} are not for this model's weights",
            where=where,
            got=f"weights {short(made_for)}",
            expected=short(weights),
            hint=hint,
        )


def check_routers_of_plans(plans: PlanTable, routers: str, *, where: object, hint: str) -> None:
    """Raises `SparsityError` if the plans were calibrated for routers with another fingerprint."""
    if not same_weights(plans.routers, routers):
        raise SparsityError(
            "the plans were calibrated for other routers",
            where=where,
            got=f"routers {short(plans.routers)}",
            expected=short(routers),
            hint=hint,
        )
