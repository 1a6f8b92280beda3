"""The letters of every shape in this project, and the type names that annotations share.

One letter means one axis everywhere: in annotations, einsums, docstrings and kernels.

| letter | axis                              | letter | axis                                        |
|--------|-----------------------------------|--------|---------------------------------------------|
| B      | sequences                         | N      | query heads, N = K·G                        |
| T      | tokens in this call               | K      | KV heads, which are the groups              |
| S      | cache capacity                    | G      | query heads per group                       |
| L      | layers                            | H      | head width                                  |
| D      | model width                       | k      | number selected                             |
| F      | MLP neurons                       | E      | embedding width (D unless a model projects) |
| V      | vocabulary                        | R      | router rank                                 |

Head sparsity selects among K; a multi-head model has G = 1.

JAX is imported only when `Array` is, so that the command's help and `inspect` start without it.
"""

import os
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Bool, Float, Int, Int32, Key, Num, UInt8, UInt32

if TYPE_CHECKING:
    import jax.typing
    from jax import Array

type ArrayLike = jax.typing.ArrayLike
type DTypeLike = jax.typing.DTypeLike
type Path = str | os.PathLike[str]
type Implementation = Literal["xla", "mosaic"] | None  # None: the best one available

IMPLEMENTATIONS = ("mosaic", "xla")
"""Names that the kernels' `implementation` takes."""

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a decoder can compute in."""

__all__ = [
    "DTYPES",
    "IMPLEMENTATIONS",
    "Array",
    "ArrayLike",
    "Bool",
    "DTypeLike",
    "Float",
    "Implementation",
    "Int",
    "Int32",
    "Key",
    "Num",
    "Path",
    "UInt8",
    "UInt32",
]


def __getattr__(name: str) -> Any:
    if name != "Array":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jax import Array

    return globals().setdefault(name, Array)
