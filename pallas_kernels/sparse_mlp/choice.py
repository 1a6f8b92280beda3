"""Looks up the tiles that were measured fastest for a call on a device."""

from typing import Any

from pallas_kernels._device import Device
from pallas_kernels._tuned import lookup as tuned
from pallas_kernels.sparse_mlp.tiles import Tiles, padded

OP = "sparse_mlp"


def shapes(batch: int, d_model: int, *, selected: int, gated: bool) -> dict[str, int]:
    """The key by which tuned tiles are stored; batches with the same padded size share one."""
    return {
        "batch": padded(batch),
        "d_model": d_model,
        "selected": selected,
        "matrices": 3 if gated else 2,
    }


def stored(tiles: Tiles) -> dict[str, int]:
    """Tiles as a tuned file stores them: the integer fields, and how many kernels compute the call."""
    return {name: n for name, n in vars(tiles).items() if type(n) is int} | {
        "kernels": 1 if tiles.fused else 2
    }


def measured(
    batch: int, d_model: int, device: Device, *, selected: int, gated: bool = False, dtype: str
) -> Tiles | None:
    """The tuned tiles for exactly this call, or None if nothing was measured for it.

    Raises:
      ValueError: the stored tiles are invalid or do not fit the call.
    """
    entry = tuned.lookup(OP, device.kind, dtype, shapes(batch, d_model, selected=selected, gated=gated))
    if entry is None:
        return None
    sizes: dict[str, Any] = dict(entry.tiles)
    try:
        tiles = Tiles(fused={1: True, 2: False}[sizes.pop("kernels")], **sizes)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{OP} tiles: not a configuration in a file of tuned tiles; got {dict(entry.tiles)}"
        ) from error
    if tiles.batch != padded(batch) or d_model % tiles.cols or tiles.blocks > device.num_sms:
        wanted = f"batch {padded(batch)}, cols that divide {d_model}, at most {device.num_sms} blocks"
        raise ValueError(
            f"{OP} tiles: a tuned configuration does not fit the call; got {tiles}, expected {wanted}"
        )
    return tiles
