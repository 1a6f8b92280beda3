"""Fingerprints of named arrays: they distinguish two models of the same shape, in milliseconds and in any dtype.

A fingerprint is one line: the dtype of the arrays, then a digest for each name in `DTYPES`, taken after a cast to that
dtype. So a model and a cast of it match: casting one to the other's dtype gives the same digest. An array of up to 2,048
values is hashed completely; of a larger one, 512 values are: 32 evenly spaced blocks of 16. A change that misses
all of them is not detected.
"""

import functools
import hashlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from polarjax.storage.dtypes import NUMPY_DTYPES
from polarjax.types import DTYPES

if TYPE_CHECKING:
    from polarjax.types import Array

_WHOLE = 2048  # largest array that is hashed completely
_BLOCK, _BLOCKS = 16, 32  # for larger arrays: values per block (a cache line), and blocks


def fingerprint_of(arrays: "Mapping[str, Array | np.ndarray]") -> str:
    """The fingerprint of named arrays; "" (unknown) without values, as under `jax.eval_shape`."""
    if not all(_is_concrete(value) for value in arrays.values()):
        return ""
    return combine({name: sample(value) for name, value in arrays.items()})


def combine(samples: Mapping[str, np.ndarray]) -> str:
    """The fingerprint of sampled arrays, in any order."""
    digests = []
    for dtype in NUMPY_DTYPES.values():
        digest = hashlib.sha256()
        with np.errstate(all="ignore"):  # a value may be too large for the dtype
            for name in sorted(samples):
                digest.update(name.encode() + samples[name].astype(dtype).tobytes())
        digests.append(digest.hexdigest()[:16])
    dtypes = {value.dtype.name for value in samples.values()}
    widest = dtypes.pop() if len(dtypes) == 1 else DTYPES[0]
    return " ".join((widest if widest in DTYPES else DTYPES[0], *digests))


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints match; an unknown or malformed one matches everything."""
    a, b = one.split(), other.split()
    if not all(len(each) == 1 + len(DTYPES) and each[0] in DTYPES for each in (a, b)):
        return True
    return any(a[1 + i] == b[1 + i] for i in (DTYPES.index(a[0]), DTYPES.index(b[0])))


def short(fingerprint: str) -> str:
    """A fingerprint for people: its dtype and digest."""
    dtype, *digests = fingerprint.split()
    return f"{dtype} {digests[DTYPES.index(dtype)]}" if dtype in DTYPES else fingerprint[:16]


def sample(value: "Array | np.ndarray") -> np.ndarray:
    """The values of an array that are hashed, in its dtype [at most 2048]."""
    places = _places(value.shape)
    if isinstance(value, np.ndarray):
        return value[places].flatten()  # a copy: the caller may reuse the memory
    import jax

    if places is ...:
        return np.asarray(jax.device_get(value)).flatten()
    found = np.empty(places[0].shape, value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            starts = [part.start or 0 for part in shard.index]
            local = np.stack([place - start for place, start in zip(places, starts, strict=True)])
            ends = np.asarray(shard.data.shape).reshape(-1, 1, 1)
            inside = ((local >= 0) & (local < ends)).all(0)
            on_host = all(device.platform == "cpu" for device in shard.data.devices())
            gather = _gather_on_host if on_host else _gather
            found[inside] = gather(shard.data, np.where(inside, local, 0))[inside]
    return found.ravel()


def _gather_on_host(shard: "Array", places: np.ndarray) -> np.ndarray:
    import jax

    return np.asarray(jax.device_get(shard))[tuple(places)]


def _gather(shard: "Array", places: np.ndarray) -> np.ndarray:
    """The values of a device's array at `places`; only these are copied to the host."""
    import jax

    index = jax.device_put(places.astype(np.int32), shard.sharding)
    return np.asarray(jax.device_get(_gathering()(shard, index)))


@functools.cache
def _gathering() -> Any:
    import jax

    return jax.jit(lambda array, places: array[tuple(places)])


def _places(shape: tuple[int, ...]) -> Any:
    """Index of the sampled values: everything, or blocks of the flat array from its first value to its last."""
    size = int(np.prod(shape, dtype=np.int64))
    if size <= _WHOLE:
        return ...
    starts = np.arange(_BLOCKS, dtype=np.int64) * (size - _BLOCK) // (_BLOCKS - 1)
    return np.unravel_index(starts[:, None] + np.arange(_BLOCK), shape)


def _is_concrete(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return True
    jax = sys.modules.get("jax")
    concrete = jax is not None and isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
    return concrete and value.is_fully_addressable and not value.is_deleted()
