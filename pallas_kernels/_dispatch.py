"""Chooses the implementation of an operation: the named one or an error, else the first that can do the call."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import jax

from pallas_kernels import _device

_log = logging.getLogger("pallas_kernels")
_recorders: ContextVar[tuple[list["Choice"], ...]] = ContextVar("recorders", default=())


@dataclass(frozen=True)
class Choice:
    """One traced call of an operation: the backend that ran, and why the better ones were rejected."""

    op: str
    backend: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.rejected)
        return f"{self.op}: {self.backend}" + (f" ({why})" if why else "")


@contextlib.contextmanager
def record_backends() -> Iterator[list[Choice]]:
    """Collects a `Choice` for every operation traced inside the block (a cached `jit` traces nothing)."""
    choices: list[Choice] = []
    token = _recorders.set((*_recorders.get(), choices))
    try:
        yield choices
    finally:
        _recorders.reset(token)


def dispatch[T](
    op: str,
    implementation: str | None,
    backends: Mapping[str, Callable[[_device.Device], T]],
    *arrays: jax.Array,
) -> T:
    """Runs one of `backends`, listed best first; each takes the device to compile for.

    `implementation=None` tries them in order for the device of `arrays`. NotImplementedError ("this backend can't")
    moves on to the next; if all fail, one NotImplementedError gives all the reasons. A named implementation runs or
    raises; on a machine without a GPU, it is lowered for a Hopper GPU.
    """
    device = _device.current(*arrays)
    if implementation is not None:
        if implementation not in backends:
            known = ", ".join(map(repr, backends))
            raise ValueError(
                f"{op}: unknown implementation; got {implementation!r}, expected {known} or None"
            )
        target = device if device.platform == "gpu" else _device.HOPPER
        return _run(Choice(op, implementation), backends[implementation], target)
    rejected: list[tuple[str, str]] = []
    for name, backend in backends.items():
        try:
            return _run(Choice(op, name, tuple(rejected)), backend, device)
        except NotImplementedError as error:
            rejected.append((name, str(error)))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise NotImplementedError(f"{op}: no implementation for {device.kind}; {reasons}")


def _run[T](choice: Choice, backend: Callable[[_device.Device], T], device: _device.Device) -> T:
    with jax.named_scope(f"{choice.op}.{choice.backend}"):
        result = backend(device)
    _log.debug("%s", choice)
    for choices in _recorders.get():
        choices.append(choice)
    return result
