"""Device memory: how much there is, what a compiled program will need, and an out-of-memory error in one line."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import jax

from polarjax import costs
from polarjax.configs import ModelConfig
from polarjax.errors import InputError, ran_out
from polarjax.model.mesh_shape import ONE_DEVICE, MeshShape
from polarjax.types import DTypeLike

_USUAL, _MOST = 0.75, 0.95  # of a device's memory that JAX takes, and that it can take


@contextlib.contextmanager
def explained_out_of_memory(
    config: ModelConfig,
    *,
    batch_size: int,
    cache_length: int,
    dtype: DTypeLike,
    mesh: MeshShape = ONE_DEVICE,
    option: str = "--batch-size",
) -> Iterator[None]:
    """Turns JAX's out-of-memory error in the block into an `InputError` that says what used the memory.

    Args:
      config: the model's configuration.
      batch_size: B, sequences computed in the block.
      cache_length: S, positions of the cache.
      dtype: dtype of weights and cache.
      mesh: the devices that share the model and the sequences.
      option: name of B in the hint.

    Raises:
      InputError: the device ran out of memory; gives the sizes and, if known, the largest batch that fits.
    """
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        memory, several = device_memory(), mesh.devices > 1
        weights = costs.weights_bytes(config, dtype, mesh=mesh)
        each = cache_length * costs.cache_bytes_per_token(mesh.local(config), dtype)
        cache = -(-batch_size // mesh.data) * each
        of = "" if memory is None else f" in {memory / 1e9:,.2f} GB"
        fitting = batch_size // 2
        if memory is not None:
            room = {"memory": memory, "cache_length": cache_length, "dtype": dtype, "mesh": mesh}
            fitting = min(costs.largest_batch(config, **room), batch_size - 1)
        fitting = fitting // mesh.batch_parts * mesh.batch_parts
        used = f"{weights / 1e9:,.2f} GB of weights, {cache / 1e9:,.2f} GB of cache, and temporaries{of}"
        raise InputError(
            "a device ran out of memory" if several else "the device ran out of memory",
            where=f"{batch_size:,} sequences of up to {cache_length:,} positions",
            got=f"on each of {mesh.devices} devices {used}" if several else used,
            expected=None if memory is None else f"at most {fitting:,} such sequences",
            hint=_hint(fitting, option),
        ) from error


def _hint(fitting: int, option: str) -> str:
    if fitting < 1:
        return "shorten the texts, or use a narrower dtype or a device with more memory"
    return f"compute fewer at a time ({option}; try {fitting:,} sequences), or shorten the texts"


def device_memory() -> int | None:
    """Bytes that JAX may use on the first device; None if the device does not report it, as on CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def host_memory() -> int | None:
    """Bytes of the machine's memory; None if the system doesn't say."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= names.keys():
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_limit() -> int | None:
    """Bytes that one program may use: those of `device_memory`, on a CPU those of the machine; None if unknown."""
    return host_memory() if jax.default_backend() == "cpu" else device_memory()


def peak_memory() -> int | None:
    """Most bytes used on the first device since the process began; None if the device does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def held_bytes() -> int:
    """Bytes of this process's arrays on the first device; arrays that share memory count once."""
    device, found = jax.local_devices()[0], {}
    for array in jax.live_arrays(device.platform):
        for shard in () if array.is_deleted() else array.addressable_shards:
            if shard.device == device:
                found[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(found.values())


def tree_bytes(*trees: Any) -> int:
    """Bytes of all arrays, or of the shapes and dtypes of future ones."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))


def planned_memory(compiled: Any, *, made: int) -> dict[str, int]:
    """Bytes that a stage needs on a device, by part and in total.

    Args:
      compiled: the stage's largest program, as the compiler planned it.
      made: bytes of the arrays that are made for the stage and live beside the program, its arguments included.
    """
    plan = compiled.memory_analysis()
    parts = {
        "already in use": held_bytes(),
        "arrays": made,
        "temporaries": plan.temp_size_in_bytes,
        "results": max(0, plan.output_size_in_bytes - plan.alias_size_in_bytes),
    }
    return parts | {"total": sum(parts.values())}


def memory_line(what: str, needed: dict[str, int]) -> str:
    """One line for people about what `planned_memory` found."""
    parts = ", ".join(f"{name} {size / 1e9:,.2f} GB" for name, size in needed.items() if name != "total")
    limit = device_memory()
    of = "" if limit is None else f" of {limit / 1e9:,.2f} GB"
    return f"{what}: {needed['total'] / 1e9:,.2f} GB{of} of device memory ({parts})"


def fraction_hint(needed: int) -> str | None:
    """How to let JAX use more of the device, if that is enough for `needed` bytes; None if it isn't."""
    limit, chosen = device_memory(), "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if limit is None or chosen in os.environ or needed > limit * _MOST / _USUAL:
        return None
    return f"set {chosen}={_MOST:g}: JAX takes {_USUAL:.0%} of the device's memory unless this says otherwise"
