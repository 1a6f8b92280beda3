"""Checks of what a model computed before it becomes a statistic."""

import numpy as np

from polarjax.errors import InputError


def check_numbers(values: np.ndarray, *, where: str) -> None:
    """Raises `InputError` where a token's statistic is NaN, as it is where the model's logits are."""
    wrong = np.argwhere(np.isnan(values))
    if len(wrong):
        raise InputError(
            "the model computes NaN",
            where=where,
            got=f"{len(wrong)} of {values.size} scored tokens, the first in window {wrong[0][0]}",
            hint="compute in float32 (--dtype float32), or convert the checkpoint again",
        )
