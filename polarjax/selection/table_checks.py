"""Checks of the fields of a `PlanTable`; what they return is static, whatever sequences it was given in."""

from typing import Any

from polarjax.errors import SparsityError
from polarjax.numeric import items, shown

_AGAIN = "run polarjax calibrate again"


def as_layers(
    given: Any, num_layers: int, *, where: str = "plan table", hint: str = _AGAIN
) -> tuple[int, ...]:
    """The numbers of the dense layers; raises `SparsityError` for one that doesn't exist."""
    layers = items(given)
    if layers is None or not all(type(layer) is int and 0 <= layer < num_layers for layer in layers):
        raise SparsityError(
            "dense_layers names layers that don't exist",
            where=where,
            got=shown(given),
            expected=f"numbers from 0 to {num_layers - 1}",
            hint=hint,
        )
    return layers


def as_calibrated(batch_sizes: Any, neurons: Any, recall: Any) -> dict[str, tuple[Any, ...]]:
    """The batch sizes, and a row of each of the others for each; raises `SparsityError` unless sizes increase."""
    sizes, *rows = map(items, (batch_sizes, neurons, recall))
    counting = sizes is not None and all(type(size) is int and size > 0 for size in sizes)
    if (
        not counting
        or list(sizes) != sorted(set(sizes))
        or any(len(each or ()) != len(sizes) for each in rows)
    ):
        raise SparsityError(
            "a plan table needs increasing batch sizes with one plan each",
            where="plan table",
            got=shown(batch_sizes),
            hint=_AGAIN,
        )
    kept, measured = (tuple(map(_row, each or ())) for each in rows)
    return {"batch_sizes": sizes, "neurons": kept, "recall": measured}


def _row(given: Any) -> tuple[Any, ...]:
    row = items(given)
    if row is None:
        raise SparsityError(
            "a plan table needs one number for each layer",
            where="plan table",
            got=shown(given),
            expected="a tuple",
            hint=_AGAIN,
        )
    return row


def check_budget_rows(budgets: Any, num_layers: int, num_groups: int, *, where: str) -> None:
    """Raises `SparsityError` unless these are the budgets of a `PlanTable` of this size; () means no budgets."""
    usable = lambda count: type(count) is int and 1 <= count <= num_groups
    right = isinstance(budgets, tuple) and all(
        isinstance(row, tuple) and len(row) == num_layers and all(map(usable, row)) for row in budgets
    )
    if not right or len(budgets) not in (0, num_groups):
        raise SparsityError(
            "unusable budgets",
            where=where,
            got=str(budgets)[:80],
            expected=f"{num_groups} tuples of {num_layers} counts from 1 to {num_groups}",
            hint="take those of the plans, or run polarjax sparsify again",
        )
