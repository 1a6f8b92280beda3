"""The likeliest tokens, as the device finds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polarjax.model.ranks import one_by_one


@pytest.mark.parametrize("n", [0, 1, 5, 12])
def test_without_sorting_the_largest_are_those_of_top_k(n):
    rng = np.random.default_rng(n)
    rows = rng.integers(-3, 4, (6, 12)).astype(np.float32)  # ties, so ids count
    rows[1, 2:] = -np.inf
    rows[2] = -np.inf
    rows[3, ::2] = np.inf
    rows[4, 5] = np.nan
    rows[5] *= np.float32(1e-45)
    for got, expected in zip(
        jax.jit(one_by_one, static_argnums=1)(rows, n), jax.lax.top_k(jnp.asarray(rows), n), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
