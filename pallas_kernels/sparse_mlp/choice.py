"""The configuration that was measured best for a call on such a device; where none was, the heuristic decides."""

from typing import Any

from pallas_kernels._device import Device
from pallas_kernels._tuned import lookup as tuned
from pallas_kernels.sparse_mlp.tiles import Tiles, padded

OP = "sparse_mlp"


def shapes(batch: int, d_model: int, *, selected: int, gated: bool) -> dict[str, int]:
    """What a call must have in common with a tuned one; batches of the same padded size are alike."""
    return {
        "batch": padded(batch),
        "d_model": d_model,
        "selected": selected,
        "matrices": 3 if gated else 2,
    }


def stored(tiles: Tiles) -> dict[str, int]:
    """A configuration as a file of tuned ones holds it: its whole numbers, and how many kernels compute the call."""
    return {name: n for name, n in vars(tiles).items() if type(n) is int} | {
        "kernels": 1 if tiles.fused else 2
    }


def measured(
    batch: int, d_model: int, device: Device, *, selected: int, gated: bool = False, dtype: str
) -> Tiles | None:
    """What a file of tuned configurations holds for exactly this call, or None.

    Raises ValueError where that is not valid or does not fit the call.
    """
    entry = tuned.lookup(OP, device.kind, dtype, shapes(batch, d_model, selected=selected, gated=gated))
    if entry is None:
        return None
    sizes: dict[str, Any] = dict(entry.tiles)
    try:
        tiles = Tiles(fused={1: True, 2: False}[sizes.pop("kernels")], **sizes)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{OP} tiles: not a configuration in a file of tuned ones; got {dict(entry.tiles)}"
        ) from error
    if tiles.batch != padded(batch) or d_model % tiles.cols or tiles.blocks > device.num_sms:
        wanted = f"batch {padded(batch)}, cols that divide {d_model}, at most {device.num_sms} blocks"
        raise ValueError(f"{OP} tiles: a tuned one does not fit the call; got {tiles}, expected {wanted}")
    return tiles
