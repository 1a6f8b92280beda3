"""Numbers as callers pass them: Python numbers, or NumPy and JAX scalars."""

import sys
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Converts a NumPy or JAX scalar to a Python number, static and hashable; returns anything else unchanged."""
    scalar = isinstance(value, np.generic | np.ndarray) or _is_concrete(value)
    return value.item() if scalar and value.ndim == 0 else value


def make_plain(instance: object, *names: str) -> None:
    """Applies `plain` to fields of a frozen dataclass, in its `__post_init__`."""
    for name in names:
        object.__setattr__(instance, name, plain(getattr(instance, name)))


def _is_concrete(value: Any) -> bool:
    """True for a JAX array that is not traced. Until JAX is imported, there is none."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
