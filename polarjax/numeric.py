"""Arguments as callers pass them: Python numbers, or NumPy and JAX scalars; and values of the wrong type."""

import sys
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from polarjax.errors import InputError, PolarjaxError

LARGEST = 2**31 - 1
"""The largest int32, and with that the largest token id, position or number of rows."""


def plain(value: Any) -> Any:
    """Converts a NumPy or JAX scalar to a Python number, static and hashable; returns anything else unchanged."""
    scalar = isinstance(value, np.generic | np.ndarray) or _is_concrete(value)
    return value.item() if scalar and value.ndim == 0 else value


def items(value: Any) -> tuple[Any, ...] | None:
    """The items of a list, a tuple, an array or another iterable, each `plain`; None for one value, a text, a set or a
    mapping, which have no items in order."""
    if isinstance(value, np.ndarray) or _is_concrete(value):
        value = value.tolist()
    if isinstance(value, str | bytes | Mapping | Set):
        return None
    try:
        given = iter(value)
    except TypeError:  # one value
        return None
    return tuple(map(plain, given))


def spread(count: int, most: int | None) -> np.ndarray:
    """At most `most` of the indices below `count`, evenly spread; None takes all."""
    kept = count if most is None else min(count, most)
    return np.arange(kept) * count // max(kept, 1)


def make_plain(instance: object, *names: str) -> None:
    """Applies `plain` to fields of a frozen dataclass, in its `__post_init__`."""
    for name in names:
        object.__setattr__(instance, name, plain(getattr(instance, name)))


def whole_number(
    value: Any,
    name: str,
    *,
    where: object,
    least: int = 1,
    most: int | None = None,
    what: str | None = None,
    error: type[PolarjaxError] = InputError,
) -> int:
    """A whole number from `least` to `most` as an int; raises `error` for anything else, booleans included."""
    number = plain(value)
    if type(number) is not int or number < least or (most is not None and number > most):
        raise error(
            what or f"{name} is not usable",
            where=where,
            got=shown(number),
            expected=f"a whole number, at least {least}" + ("" if most is None else f" and at most {most}"),
            hint=f"pass for example {name}={max(least, 8)}",
        )
    return number


def check_type[T](
    value: Any, kind: type[T], *, where: object, hint: str, error: type[PolarjaxError] = InputError
) -> T:
    """`value` if it is a `kind`; raises `error` otherwise."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise error(f"not {article} {kind.__name__}", where=where, got=_type_and_value(value), hint=hint)
    return value


def check_flags(where: str, **flags: Any) -> None:
    """Raises `InputError` unless every flag is True or False."""
    for name, value in flags.items():
        check_type(value, bool, where=f"{where}: {name}", hint="pass True or False")


def shown(value: Any) -> str:
    """A short form of a wrong value for a message."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(value, jax.core.Tracer):
        return "a traced value, where a static number is needed"
    return repr(value)[:80]


def _type_and_value(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, int | float | str | bytes | None) else type(value).__name__


def _is_concrete(value: Any) -> bool:
    """True for a JAX array of numbers that is not traced; random keys are none. Until JAX is imported, there is no
    array."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return False
    return not jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended)
