"""Records of a forward pass for learning: router inputs, neuron activity, group norms."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from polarjax.types import Array, Bool, Float, UInt8


@dataclasses.dataclass(frozen=True)
class TapSpec:
    """Which records to keep; static under `jax.jit`.

    Attributes:
      inputs: the output of each layer's pre-attention norm, which the routers read.
      activity: which neurons have a pre-activation above the threshold (0 for a plain ReLU), bit-packed.
      norms: each group's importance: the L2 norm of its attention output before the output projection, unless the
        selector of the pass ranks groups by another measure (`polarjax.selection.means.Importance`).
      change: 1 - cos of the residual stream before and after attention.
      heads: the mean over each row's tokens of the attention output before the output projection.
    """

    inputs: bool = True
    activity: bool = True
    norms: bool = True
    change: bool = True
    heads: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Taps:
    """The records of one forward pass; a field is empty if its `TapSpec` flag is off.

    Attributes:
      inputs: L arrays [B T D] in the model's dtype.
      activity: L arrays uint8 [B T ceil(F / 8)]; neuron j is bit `7 - j % 8` of byte `j // 8`.
      norms: L arrays float32 [B T K].
      change: L arrays float32 [B T]: 1 - cos of the residual stream before and after the layer's attention.
      heads: L arrays float32 [B K G H]: the mean attention output over the valid tokens of each row.
    """

    inputs: tuple[Float[Array, "B T D"], ...] = ()
    activity: tuple[UInt8[Array, "B T bytes"], ...] = ()
    norms: tuple[Float[Array, "B T K"], ...] = ()
    change: tuple[Float[Array, "B T"], ...] = ()
    heads: tuple[Float[Array, "B K G H"], ...] = ()

    @classmethod
    def of(cls, spec: TapSpec, records: Sequence[tuple[Array, Array, Array, Array, Array]]) -> "Taps":
        """The records that `spec` selects from each layer's (inputs, activity, norms, change, heads)."""
        wanted = (spec.inputs, spec.activity, spec.norms, spec.change, spec.heads)
        columns = zip(wanted, zip(*records, strict=True), strict=True)
        return cls(*(column if keep else () for keep, column in columns))


def pack(activity: Bool[Array, "... F"]) -> UInt8[Array, "... bytes"]:
    """Eight neurons per byte, first neuron in the highest bit; the last byte is zero-padded."""
    return jnp.packbits(activity, axis=-1)


def unpack(packed: UInt8[Array, "... bytes"], num_neurons: int) -> Bool[Array, "... F"]:
    """The inverse of `pack`."""
    return jnp.unpackbits(packed, axis=-1, count=num_neurons).astype(bool)
