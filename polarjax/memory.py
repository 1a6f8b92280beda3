"""Turns an out-of-memory error into one line that says what needed how much and what would fit."""

import contextlib
from collections.abc import Iterator

import jax

from polarjax import costs
from polarjax.configs import ModelConfig
from polarjax.errors import InputError, ran_out
from polarjax.types import DTypeLike


@contextlib.contextmanager
def explained_out_of_memory(
    config: ModelConfig, *, batch_size: int, cache_length: int, dtype: DTypeLike
) -> Iterator[None]:
    """Turns JAX's out-of-memory error in the block into an `InputError` that says what used the memory.

    Args:
      config: the model's configuration.
      batch_size: B, sequences computed in the block.
      cache_length: S, positions of the cache.
      dtype: dtype of weights and cache.

    Raises:
      InputError: the device ran out of memory; gives the sizes and, if known, the largest batch that fits.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        memory = device_memory()
        weights = costs.weights_bytes(config, dtype)
        cache = batch_size * cache_length * costs.cache_bytes_per_token(config, dtype)
        of = "" if memory is None else f" in {memory / 1e9:,.2f} GB"
        fitting = batch_size // 2
        if memory is not None:
            room = {"memory": memory, "cache_length": cache_length, "dtype": dtype}
            fitting = min(costs.largest_batch(config, **room), batch_size - 1)
        raise InputError(
            "the device ran out of memory",
            where=f"{batch_size:,} sequences of up to {cache_length:,} positions",
            got=f"{weights / 1e9:,.2f} GB of weights, {cache / 1e9:,.2f} GB of cache, and temporaries{of}",
            expected=None if memory is None else f"at most {fitting:,} such sequences",
            hint=_hint(fitting),
        ) from error


def _hint(fitting: int) -> str:
    if fitting < 1:
        return "shorten the texts, or use a narrower dtype or a device with more memory"
    return f"compute fewer at a time (--batch-size; try {fitting:,} sequences), or shorten the texts"


def device_memory() -> int | None:
    """Bytes that JAX may use on the first device; None if the device does not report it, as on CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_memory() -> int | None:
    """Most bytes used on the first device since the process began; None if the device does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
