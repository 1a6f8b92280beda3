"""What makes a group important. No JAX, so that help can show the choices."""

from typing import Any, Literal, get_args

from polarjax.errors import InputError
from polarjax.numeric import shown

type Importance = Literal["norms", "contributions"]
"""How a group's importance is measured. "norms", as published: the L2 norm of its attention output before the output
projection. "contributions": that of what the layer's output loses without it, after the output projection; if a mean
output replaces a skipped group, the loss is the distance to it."""

IMPORTANCES = get_args(Importance.__value__)


def check_importance(value: Any, where: str) -> Importance:
    """The value; raises `InputError` if it is not an `Importance`."""
    if not isinstance(value, str) or value not in IMPORTANCES:
        got, expected = value if isinstance(value, str) else shown(value), " | ".join(IMPORTANCES)
        hint = "leave it out to take contributions"
        raise InputError("no such measure of importance", where=where, got=got, expected=expected, hint=hint)
    return value  # pyrefly: ignore[bad-return]
