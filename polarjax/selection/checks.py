"""Checks of the `sparsity` argument."""

from typing import Any

from polarjax.configs import ModelConfig
from polarjax.errors import SparsityError
from polarjax.selection.selectors import Sparsity


def check_sparsity(sparsity: Any, config: ModelConfig) -> None:
    """Raises `SparsityError` unless `sparsity` is None or a `Sparsity` for a model of this configuration."""
    if sparsity is None:
        return
    if not isinstance(sparsity, Sparsity):
        raise SparsityError(
            "not a Sparsity",
            where="sparsity",
            got=type(sparsity).__name__,
            expected="a Sparsity, or None for the dense model",
            hint="pass bundle.sparsity(batch_size), or pj.Sparsity(routers, plan)",
        )
    sparsity.check(config)
