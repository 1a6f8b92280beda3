"""What the devices of a mesh exchange in a decoding step, and how long that takes; computed without JAX."""

import dataclasses
from typing import Literal

import numpy as np

from polarjax.configs import ModelConfig
from polarjax.model.mesh_shape import MeshShape


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One kind of collective operation in a step.

    Attributes:
      kind: "all-reduce", or "all-to-all".
      count: how often a step makes it.
      num_bytes: size of each device's operand.
    """

    kind: Literal["all-reduce", "all-to-all"]
    count: int
    num_bytes: int


def exchanges(
    config: ModelConfig, mesh: MeshShape, *, batch_size: int, item: int = 2
) -> tuple[Exchange, ...]:
    """The collectives of a step over the axis `model`; there are none over `data`.

    Two all-reduces a layer (after the output projections of attention and MLP) and, if the vocabulary is divided, one of
    the embedding rows, each of [B D].
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
    count = 2 * config.num_layers + ("vocab" in mesh.divided)
    found = [Exchange("all-reduce", count, rows * config.d_model * item)]
    if mesh.attention == "sequences":
        head = rows * local.head_dim * item
        found.append(
            Exchange("all-to-all", config.num_layers, head * (local.num_heads + 2 * local.num_kv_heads))
        )
        found.append(Exchange("all-to-all", config.num_layers, head * local.num_heads))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Link:
    """How long collectives between the devices of one host take.

    Attributes:
      points: (bytes, seconds) of an all-reduce over two devices, ascending; at least two.
      hop: seconds that each further step of a ring adds.
    """

    points: tuple[tuple[float, float], ...]
    hop: float

    def seconds(self, exchange: Exchange, devices: int) -> float:
        """The time of one such exchange over so many devices.

        A ring of n devices takes 2(n - 1) steps and sends 2(n - 1)/n times the operand from each device; an all-to-all
        takes half of both. Times between the points are interpolated, those above extrapolated.
        """
        if devices == 1:
            return 0.0
        half = 0.5 if exchange.kind == "all-to-all" else 1.0
        sent = half * exchange.num_bytes * 2 * (devices - 1) / devices
        steps = half * 2 * (devices - 1)
        return self._of_two(sent) + self.hop * max(0.0, steps - 2)

    def _of_two(self, size: float) -> float:
        sizes, times = map(np.asarray, zip(*self.points, strict=True))
        if size > sizes[-1]:
            slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
            return float(times[-1] + slope * (size - sizes[-1]))
        return float(np.interp(size, sizes, times))


NVLINK = Link(((131072, 10e-6), (524288, 15e-6), (1048576, 17.5e-6)), hop=0.65e-6)
"""All-reduces over two H200s by NCCL, NVLink without multicast. `hop` is an assumption, not measured."""
