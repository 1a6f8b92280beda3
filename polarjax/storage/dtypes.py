"""The dtypes that a decoder computes in, as NumPy knows them."""

import contextlib

import ml_dtypes
import numpy as np

from polarjax.errors import InputError
from polarjax.types import DTYPES, DTypeLike

NUMPY_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPES}


def check_dtype(dtype: DTypeLike, *, where: str = "dtype") -> np.dtype:
    """The NumPy dtype; raises `InputError` unless it is one of `DTYPES`."""
    with contextlib.suppress(TypeError):
        found = NUMPY_DTYPES.get(dtype) if isinstance(dtype, str) else np.dtype(dtype)
        if found is not None and found in NUMPY_DTYPES.values():
            return found
    got = getattr(dtype, "__name__", dtype)
    expected = " | ".join(DTYPES)
    raise InputError("unusable dtype", where=where, got=got, expected=expected, hint="pass one of these")
