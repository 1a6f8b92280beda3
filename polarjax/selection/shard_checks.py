"""Checks of plans whose neurons or groups are divided into equal blocks."""

from typing import Any

from polarjax.errors import SparsityError


def check_shards(name: str, counts: tuple[int | None, ...], shards: int, *, where: str) -> None:
    """Raises `SparsityError` unless every count of neurons or groups can be divided over the shards."""
    for count in counts:
        if count is not None and count % shards:
            raise SparsityError(
                f"{count:,} {name} can't be divided over {shards:,} shards",
                where=where,
                expected=f"a multiple of {shards:,}",
                hint="make plans for a number of shards that divides the model's groups and neurons: polarjax "
                "sparsify MODEL --text FILE --shards",
            )


def check_order(order: Any, num_layers: int, num_groups: int, *, where: str) -> None:
    """Raises `SparsityError` unless this is the `order` of a `PlanTable` of this size; () means no order."""
    everything = list(range(num_groups))
    right = isinstance(order, tuple) and all(
        isinstance(row, tuple) and all(type(group) is int for group in row) and sorted(row) == everything
        for row in order
    )
    if not right or len(order) not in (0, num_layers):
        raise SparsityError(
            "unusable order of groups",
            where=where,
            got=str(order)[:80],
            expected=f"{num_layers} tuples that hold each number from 0 to {num_groups - 1} once",
            hint="take that of the plans, or run polarjax calibrate again",
        )
