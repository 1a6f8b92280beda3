"""Numbers as callers pass them: Python numbers, or NumPy and JAX scalars."""

import sys
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """A NumPy or JAX scalar as a Python number, which is static and hashable; anything else unchanged."""
    scalar = isinstance(value, np.generic | np.ndarray) or _is_concrete(value)
    return value.item() if scalar and value.ndim == 0 else value


def make_plain(instance: object, *names: str) -> None:
    """Applies `plain` to fields of a frozen dataclass under construction."""
    for name in names:
        object.__setattr__(instance, name, plain(getattr(instance, name)))


def _is_concrete(value: Any) -> bool:
    """True for a JAX array that is not traced. Without JAX imported there are none."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
