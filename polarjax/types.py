"""The letters of every shape in this project, and the names that annotations share.

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

Head sparsity is over K: a multi-head model is the case G = 1.
"""

import os
from typing import Literal

from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int, Int32, Key, Num, UInt8

type Path = str | os.PathLike[str]
type Implementation = Literal["xla", "mosaic"] | None  # None: the best one available

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a decoder computes in."""

__all__ = [
    "DTYPES",
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
]
