"""What the kernel can sum, and how a thread block shares a row among its threads."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

WARPGROUP = 128  # threads
VECTOR = 8  # bfloat16 that a thread handles at once: 16 bytes
UNIT = WARPGROUP * VECTOR  # bfloat16 of a warpgroup
MAX_WARPGROUPS = 8
MAX_DEVICES = 8
MAX_RECEIVED = 2**21  # bfloat16 that a device receives for a sum; of more, NCCL's rings send less

type Kind = Literal["rms", "layer"]


class Link(NamedTuple):
    """What devices need to send each other parts of sums.

    Attributes:
      memory: this device receives in it, uint32 [words].
      addresses: of all devices' memory, the low half first, and last this device's number, uint32 [devices + 1, 2].
    """

    memory: Array
    addresses: Array

    @property
    def devices(self) -> int:
        """How many devices sum."""
        return self.addresses.shape[0] - 1


class Problem(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      rows, width: of the residual stream.
      devices: that sum.
      kind, eps: of the norm, and what it adds to the mean square.
      biased, shifted: whether the update has a bias, and the norm.
      summands: float32 arrays that a device's part comes in; 0 if it is one of bfloat16.
    """

    rows: int
    width: int
    devices: int
    kind: Kind
    eps: float
    biased: bool
    shifted: bool
    summands: int

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a thread block, which has a row."""
        units = self.width // UNIT
        return max(n for n in range(1, MAX_WARPGROUPS + 1) if units % n == 0)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warpgroups * WARPGROUP

    @property
    def vectors(self) -> int:
        """Vectors of a thread."""
        return self.width // (self.threads * VECTOR)


def words(elements: int, devices: int) -> int:
    """uint32 words in which a device receives sums of so many bfloat16: two halves, each as much of marks as of data."""
    return 2 * devices * elements


def check_sizes(rows: int, width: int, devices: int) -> None:
    """Raises NotImplementedError if the kernel can't sum [rows width] over so many devices."""
    if width % UNIT:
        raise NotImplementedError(f"needs rows of a multiple of {UNIT} elements; got {width}")
    if not 1 < devices <= MAX_DEVICES:
        raise NotImplementedError(f"sums over 2 to {MAX_DEVICES} devices; got {devices}")
    if rows * width * devices > MAX_RECEIVED:
        raise NotImplementedError(f"sums up to {MAX_RECEIVED // devices} elements; got {rows * width}")


def check_mesh(mesh: Mesh) -> None:
    """Raises NotImplementedError unless kernels of the mesh's devices can write into each other's memory.

    Pallas numbers devices in the order of the mesh, XLA by their ids.
    """
    devices: Sequence[Any] = list(mesh.devices.flat)
    if len({device.process_index for device in devices}) > 1:
        raise NotImplementedError("needs devices of one process")
    if [device.id for device in devices] != list(range(len(devices))):
        raise NotImplementedError(f"needs devices 0 to {len(devices) - 1}, in this order")
    if not _reach_each_other(tuple(device.local_hardware_id for device in devices)):
        raise NotImplementedError("needs GPUs that reach each other's memory")


@functools.cache
def _reach_each_other(ordinals: tuple[int | None, ...]) -> bool:
    """Whether each GPU can access the others' memory; True if the CUDA driver isn't there to be asked."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    found, pairs = ctypes.c_int(), [(a, b) for a in ordinals for b in ordinals if a != b]
    fine = lambda a, b: driver.cuDeviceCanAccessPeer(ctypes.byref(found), a, b) == 0 and found.value == 1
    return None in ordinals or all(fine(*pair) for pair in pairs)


def stride(mesh: Mesh, axis: str) -> int:
    """By how much a device's number in the mesh grows along an axis."""
    return int(np.prod(mesh.devices.shape[mesh.axis_names.index(axis) + 1 :]))
