"""Mean outputs of skipped groups, and what makes a group important: properties that a selector may have."""

from typing import Any

import jax.numpy as jnp

from polarjax.selection.importance import Importance
from polarjax.types import Array, Bool, Float


def importance_of(selector: Any) -> Importance:
    """What `selector` ranks groups by; "norms" if it doesn't say."""
    return getattr(selector, "importance", "norms")


def mean_output(selector: Any, layer: Any) -> Float[Array, "K D"] | None:
    """The layer's mean outputs, which replace those of skipped groups; None if zeros do."""
    find = getattr(selector, "mean_output", None)
    return None if find is None else find(layer)


def filled(
    mean: Float[Array, "K D"] | None, kept: Bool[Array, "... K"] | None, dtype: Any
) -> Float[Array, "... D"] | None:
    """The sum of the mean outputs of the groups that aren't `kept`, in `dtype`; None if nothing is replaced."""
    if mean is None or kept is None:
        return None
    skipped = 1 - kept.astype(dtype)
    return jnp.dot(skipped, mean.astype(dtype))
