"""How far apart two computations of the same numbers may be: the one table, for all tests."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


class Tolerance(NamedTuple):
    """Passes where |actual - expected| <= atol + rtol * |expected|."""

    atol: float
    rtol: float


type Comparison = Literal["parity", "rounding", "kernel"]

# parity: logits against the original model's own code, as published
# rounding: the same mathematics by two of our paths (decode against forward, a row alone against in a batch)
# kernel: an implementation of an operation against its float32 oracle; bfloat16 results carry 8 bits
TOLERANCES: dict[tuple[Comparison, str], Tolerance] = {
    ("parity", "float32"): Tolerance(1e-4, 0.0),
    ("parity", "bfloat16"): Tolerance(1e-1, 2e-2),
    ("rounding", "float32"): Tolerance(2e-5, 2e-5),
    ("rounding", "bfloat16"): Tolerance(5e-2, 2e-2),
    ("kernel", "float32"): Tolerance(1e-5, 1e-5),
    ("kernel", "float16"): Tolerance(2e-3, 2e-3),
    ("kernel", "bfloat16"): Tolerance(1e-2, 1.6e-2),
}

OWN_ERRORS = 2.0
"""Where a float64 result is at hand: how many times the original model's own float32 error ours may be."""


def assert_close(
    actual: ArrayLike, expected: ArrayLike, comparison: Comparison, dtype: DTypeLike = jnp.float32
) -> None:
    """Fails unless shapes are equal and values agree within the table's tolerance for `dtype`.

    Args:
        actual: the values under test, any shape.
        expected: what they should be.
        comparison: which row of the table.
        dtype: the dtype the computation under test was made in.
    """
    got, want = np.asarray(actual), np.asarray(expected)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    atol, rtol = TOLERANCES[comparison, jnp.dtype(dtype).name]
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), atol=atol, rtol=rtol)
