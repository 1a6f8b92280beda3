"""Numbers as callers give them: Python's own, or scalars of NumPy and JAX."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def plain(value: Any) -> Any:
    """A scalar of NumPy or JAX as the Python number it is, which is static and hashes; all else unchanged."""
    scalar = isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0
    return value.item() if scalar and not isinstance(value, Tracer) else value


def make_plain(instance: object, *names: str) -> None:
    """Applies `plain` to fields of a frozen dataclass that is being made."""
    for name in names:
        object.__setattr__(instance, name, plain(getattr(instance, name)))
