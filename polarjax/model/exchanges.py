"""What the devices of a mesh exchange in a decoding step, and how long that takes; computed without JAX."""

import dataclasses
from typing import Literal

import numpy as np

from polarjax.configs import ModelConfig
from polarjax.model.mesh_shape import MeshShape

KERNEL_UNIT, KERNEL_DEVICES, KERNEL_ELEMENTS = 1024, 8, 2**21
"""What `pallas_kernels.all_reduce_norm` sums: rows of a multiple of this width, over at most so many devices, of which
each receives at most so many elements; written here, too, because this module doesn't import JAX."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One kind of collective operation in a step.

    Attributes:
      kind: "sum" by a kernel of ours (`pallas_kernels.all_reduce_norm`), or NCCL's "all-reduce" or "all-to-all".
      count: how often a step makes it.
      num_bytes: size of each device's operand.
    """

    kind: Literal["sum", "all-reduce", "all-to-all"]
    count: int
    num_bytes: int


def exchanges(
    config: ModelConfig, mesh: MeshShape, *, batch_size: int, item: int = 2
) -> tuple[Exchange, ...]:
    """The collectives of a step over the axis `model`; there are none over `data`.

    Two sums a layer (after the output projections of attention and MLP) and, if the vocabulary is divided, an all-reduce
    of the embedding rows, each of [B D]. Sums that the kernel can't make are all-reduces too.
    With attention by sequences, two all-to-alls a layer more: of queries, keys and values, and of the output.

    Args:
      config: the model's configuration.
      mesh: the devices.
      batch_size: B, over all devices.
      item: bytes per element.

    Raises:
      InputError: the mesh doesn't divide the model or the batch.
    """
    rows, local = mesh.rows(batch_size), mesh.local(config)
    if mesh.model == 1:
        return ()
    operand = rows * config.d_model * item
    kind = "sum" if _in_kernel(config, rows, mesh.model, item) else "all-reduce"
    found = [Exchange(kind, 2 * config.num_layers, operand)]
    if "vocab" in mesh.divided:
        found.append(Exchange("all-reduce", 1, operand))
    if mesh.attention == "sequences":
        head = rows * local.head_dim * item
        found.append(
            Exchange("all-to-all", config.num_layers, head * (local.num_heads + 2 * local.num_kv_heads))
        )
        found.append(Exchange("all-to-all", config.num_layers, head * local.num_heads))
    return tuple(found)


def _in_kernel(config: ModelConfig, rows: int, devices: int, item: int) -> bool:
    """Whether devices of one process sum [rows D] in a kernel."""
    width, before = config.d_model, config.norm_position == "pre"
    sizes = (
        width % KERNEL_UNIT == 0 and devices <= KERNEL_DEVICES and rows * width * devices <= KERNEL_ELEMENTS
    )
    return before and item == 2 and sizes


@dataclasses.dataclass(frozen=True)
class Link:
    """How long collectives between the devices of one host take.

    Attributes:
      points: (bytes, seconds) of an all-reduce over two devices, ascending; at least two.
      hop: seconds that each further step of a ring adds.
      sums: (bytes, seconds) of a sum by the kernel over two devices, ascending; at least two.
    """

    points: tuple[tuple[float, float], ...]
    hop: float
    sums: tuple[tuple[float, float], ...]

    def seconds(self, exchange: Exchange, devices: int) -> float:
        """The time of one such exchange over so many devices.

        A ring of n devices takes 2(n - 1) steps and sends 2(n - 1)/n times the operand from each device; an all-to-all
        takes half of both. In the kernel's sum, each device sends its operand to all others. Times between the points
        are interpolated, those above extrapolated.
        """
        if devices == 1:
            return 0.0
        if exchange.kind == "sum":
            return _time(self.sums, exchange.num_bytes * (devices - 1))
        half = 0.5 if exchange.kind == "all-to-all" else 1.0
        sent = half * exchange.num_bytes * 2 * (devices - 1) / devices
        steps = half * 2 * (devices - 1)
        return _time(self.points, sent) + self.hop * max(0.0, steps - 2)


def _time(points: tuple[tuple[float, float], ...], size: float) -> float:
    sizes, times = map(np.asarray, zip(*points, strict=True))
    if size > sizes[-1]:
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        return float(times[-1] + slope * (size - sizes[-1]))
    return float(np.interp(size, sizes, times))


NVLINK = Link(
    points=((131072, 10e-6), (524288, 15e-6), (1048576, 17.5e-6)),
    hop=0.65e-6,
    sums=((8192, 4.5e-6), (131072, 5.9e-6), (524288, 9.3e-6), (1048576, 11.4e-6)),
)
"""Two H200s: all-reduces by NCCL over NVLink without multicast, and sums by the kernel, each with the small kernel
between them. `hop` is an assumption, not measured."""
