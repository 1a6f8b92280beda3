"""Numbers as callers pass them: Python numbers, or NumPy and JAX scalars."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def plain(value: Any) -> Any:
    """A NumPy or JAX scalar as a Python number, which is static and hashable; anything else unchanged."""
    scalar = isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0
    return value.item() if scalar and not isinstance(value, Tracer) else value


def make_plain(instance: object, *names: str) -> None:
    """Applies `plain` to fields of a frozen dataclass under construction."""
    for name in names:
        object.__setattr__(instance, name, plain(getattr(instance, name)))
