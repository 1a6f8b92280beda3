"""The key/value cache of a batch of sequences."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import PartitionSpec

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model.layout import Layout
from polarjax.numeric import LARGEST, check_type, whole_number
from polarjax.storage.dtypes import check_dtype
from polarjax.types import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of all positions seen so far, group-major so that a skipped group is a contiguous range.

    Attributes:
      k: L arrays [B K S H].
      v: L arrays [B K S H].
      length: positions filled in each sequence, int32 [B]; the rest is never read.
    """

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]
    length: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """S, the most positions per sequence."""
        return self.k[0].shape[2]


def init_cache(
    config: ModelConfig,
    *,
    batch_size: int,
    capacity: int,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout | None = None,
) -> KVCache:
    """An empty cache.

    Args:
      config: the model's configuration.
      batch_size: B.
      capacity: S, in tokens; the GPU kernels need a multiple of 8.
      dtype: dtype of keys and values; use the model's.
      layout: `model.layout` of a model on a mesh, whose devices then have a part of the cache each.

    Raises:
      InputError: `batch_size` or `capacity` is not a positive whole number, or no decoder computes in `dtype`.
    """
    check_type(config, ModelConfig, where="init_cache", hint="pass model.config")
    if not export.is_symbolic_dim(batch_size):
        batch_size = whole_number(batch_size, "batch_size", where="init_cache", most=LARGEST)
    capacity = whole_number(capacity, "capacity", where="init_cache", most=LARGEST)
    dtype = check_dtype(dtype)
    shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
    if not export.is_symbolic_dim(batch_size) and math.prod(shape) * dtype.itemsize >= 2**63:
        raise InputError(
            "no device could hold such a cache",
            where="init_cache",
            got=f"{list(shape)} in each layer",
            expected="fewer bytes than an int64 can count",
            hint="lower batch_size or capacity",
        )
    if layout is not None:
        layout.sizes.rows(batch_size, where="init_cache")
    specs = () if layout is None else (layout.cache_spec(), PartitionSpec(layout.data))
    place, rows = [layout.sharding(spec) for spec in specs] if layout is not None else (None, None)
    zero, none = jax.device_put((np.zeros((), dtype), np.int32(0)))  # explicitly, for jax.transfer_guard
    make = lambda: tuple(jnp.full(shape, zero, device=place) for _ in range(config.num_layers))
    return KVCache(make(), make(), jnp.full((batch_size,), none, device=rows))


def write_prompt(cache: Float[Array, "B K S H"], new: Float[Array, "B T K H"]) -> Float[Array, "B K S H"]:
    """The cache of one layer with positions 0 … T-1 replaced by `new`."""
    return jax.lax.dynamic_update_slice(cache, new.swapaxes(1, 2).astype(cache.dtype), (0, 0, 0, 0))


@jax.named_scope("append")
def write_token(
    cache: Float[Array, "B K S H"], new: Float[Array, "B K H"], position: Int[Array, "B"]
) -> Float[Array, "B K S H"]:
    """The cache of one layer with each sequence's `position` replaced by `new`; positions past S are dropped."""
    rows = jnp.arange(cache.shape[0])
    if rows.size == 1:  # XLA would first read what is there; the second row is dropped
        rows, position, new = jnp.arange(2), jnp.repeat(position, 2), jnp.repeat(new, 2, 0)
    return cache.at[rows, :, position].set(new.astype(cache.dtype), mode="drop", unique_indices=True)


def write_chunk(
    cache: Float[Array, "B K S H"],
    new: Float[Array, "R T K H"],
    rows: Int[Array, "R"],
    positions: Int[Array, "R T"],
) -> Float[Array, "B K S H"]:
    """The cache of one layer with these positions of `rows` replaced by `new`; those outside of it are dropped.

    No position inside may be given twice: writes that can't meet need no atomic operations, which take 4 % of a prompt.
    Groups are numbered, too: the XLA of jax 0.12 would else transpose the whole cache, so that what is numbered comes
    first, and back.
    """
    groups = jnp.arange(cache.shape[1], dtype=jnp.int32)[None, None]
    where = cache.at[rows[:, None, None], groups, positions[:, :, None]]
    return where.set(new.astype(cache.dtype), mode="drop", unique_indices=True)
