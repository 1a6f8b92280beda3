"""The device that a kernel is compiled for."""

from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer


@dataclass(frozen=True)
class Device:
    """A device to compile for.

    platform: "cpu", "gpu" or "tpu". compute_capability: (major, minor) of an NVIDIA GPU, else None.
    num_sms: multiprocessors. smem_bytes: shared memory that one block may use.
    """

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None = None
    num_sms: int = 1
    smem_bytes: int = 0


HOPPER = Device("gpu", "NVIDIA H200", (9, 0), 132, 232448)


def current(*arrays: jax.Array) -> Device:
    """The device of the ambient abstract mesh, else of the concrete `arrays`, else JAX's default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return _described(abstract.platform, abstract.device_kind, abstract.num_cores)
    for array in arrays:
        if not isinstance(array, Tracer) and isinstance(array, jax.Array):
            return _concrete(next(iter(array.devices())))
    default = jax.config.jax_default_device
    return _concrete(default if isinstance(default, jax.Device) else jax.devices(default)[0])


def require_hopper(device: Device) -> None:
    """Raises NotImplementedError unless `device` executes Hopper's `wgmma` instructions."""
    if device.platform != "gpu":
        raise NotImplementedError(f"needs an NVIDIA Hopper GPU; got {device.kind}")
    if device.compute_capability is None or device.compute_capability[0] != 9:
        found = device.compute_capability or "none"
        raise NotImplementedError(f"needs compute capability 9.x; got {found} ({device.kind})")


def require_static_shapes(*arrays: jax.Array) -> None:
    """Raises NotImplementedError if an axis of the arrays has a symbolic size, as under `jax.export`."""
    for array in arrays:
        if not all(isinstance(size, int) for size in array.shape):
            raise NotImplementedError(f"needs static shapes; got {list(array.shape)}")


def _concrete(device: Any) -> Device:
    if device.platform != "gpu":
        return Device(device.platform, device.device_kind)
    capability = getattr(device, "compute_capability", None)
    return Device(
        "gpu",
        device.device_kind,
        _version(capability) if capability else None,
        getattr(device, "core_count", HOPPER.num_sms),
        getattr(device, "shared_memory_per_block_optin", HOPPER.smem_bytes),
    )


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def _described(platform: str, kind: str, num_cores: int | None) -> Device:
    """A device known only by name: Hopper if the product name says so, else without a compute capability."""
    if platform not in ("gpu", "cuda"):
        return Device(platform, kind)
    hopper = any(name in kind for name in ("H100", "H200", "H20", "H800", "GH200"))
    capability = HOPPER.compute_capability if hopper else None
    return Device("gpu", kind, capability, num_cores or HOPPER.num_sms, HOPPER.smem_bytes)
