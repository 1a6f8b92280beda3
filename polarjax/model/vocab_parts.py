"""Logits on a mesh, outside of `on_each_device`: XLA divides the work, each device has its part of the vocabulary."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from polarjax.model.layout import Layout
from polarjax.model.parallel import constrained, on_each_device
from polarjax.model.ranks import largest_of
from polarjax.types import Array, Float, Int

_LAYOUT: ContextVar[tuple[Layout | None, bool]] = ContextVar("layout of logits", default=(None, False))


@contextlib.contextmanager
def vocab_divided(layout: Layout | None, *, rows: bool = True) -> Iterator[None]:
    """Inside, this module's functions know how logits lie; None is one device. `rows`: whether `data` divides them."""
    token = _LAYOUT.set((layout, rows))
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def over_vocab(logits: Float[Array, "B *T V"]) -> Float[Array, "B *T V"]:
    """The logits, of which each device has its sequences and its part of the vocabulary. Traceable."""
    layout, _ = _LAYOUT.get()
    return logits if layout is None else constrained(layout, logits, _spec(layout, logits))


def largest(logits: Float[Array, "B V"], n: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The n largest of each row, the largest first, and their ids; the lower id first on a tie. Traceable.

    Devices exchange the n largest of their parts of the vocabulary, not the logits.
    """
    layout, _ = _LAYOUT.get()
    if layout is None or layout.parts("vocab") == 1:
        return largest_of(logits, n)

    def run(own: Float[Array, "b v"]) -> tuple[Float[Array, "b n"], Int[Array, "b n"]]:
        best, ids = largest_of(own, min(n, own.shape[1]))
        ids = ids + own.shape[1] * jax.lax.axis_index("model").astype(ids.dtype)
        best, ids = (jax.lax.all_gather(each, "model", axis=1, tiled=True) for each in (best, ids))
        best, among = largest_of(best, n)
        return best, jnp.take_along_axis(ids, among, 1)

    spec = _spec(layout, logits)
    rows = PartitionSpec(spec[0])
    return on_each_device(layout, run, (logits,), specs=(spec,), out=(rows, rows))


def _spec(layout: Layout, logits: Float[Array, "B *T V"]) -> PartitionSpec:
    divided = _LAYOUT.get()[1] and logits.shape[0] % layout.sizes.data == 0
    data = layout.data if divided else None
    return PartitionSpec(data, *[None] * (logits.ndim - 2), layout.rules["vocab"])
