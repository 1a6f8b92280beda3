"""Which tokens are recorded if not all fit on the disk, and which layers at a time."""

import numpy as np

from polarjax.errors import InputError
from polarjax.types import Int

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly


def kept_positions(
    offered: int, bytes_each: int, max_bytes: int, fit: bool, *, fixed: int = 0, one_layer: bool = False
) -> Int[np.ndarray, "kept"]:
    """Ascending positions of the token stream to record: all of them, or as many as fit, evenly spread.

    The stream is cut into `kept` equal stretches, and one position is taken from each. Its place in the stretch
    varies, so that the spacing does not resonate with the window length. `fixed` bytes are written in any case;
    `one_layer` says that the bytes are those of one layer alone.

    Raises:
      InputError: all positions need more than `max_bytes` and `fit` is False, or not even 64 fit.
    """
    allowed = min(offered, max(int(max_bytes) - fixed, 0) // bytes_each)
    if allowed < offered and (not fit or allowed < 64):
        few = "; polarjax sparsify without --activations records a few layers at a time"
        raise InputError(
            "the activations would be larger than allowed",
            where="collect",
            got=f"{(offered * bytes_each + fixed) / 1e9:.3g} GB for {offered:,} tokens"
            + (" of one layer" if one_layer else ""),
            expected=f"at most {max_bytes / 1e9:.3g} GB",
            hint="raise --max-gb, use less text, or pass --fit to record fewer positions"
            + ("" if one_layer else few),
        )
    edges = np.arange(allowed + 1) * offered // max(allowed, 1)
    stagger = np.arange(allowed) * _GOLDEN % 1.0
    return edges[:-1] + (stagger * np.diff(edges)).astype(edges.dtype)


def divided(num_layers: int, passes: int) -> tuple[range, ...]:
    """The layers of each of `passes` passes, as even as possible, the largest first."""
    edges = [-(-num_layers * i // passes) for i in range(passes + 1)]
    return tuple(map(range, edges, edges[1:]))
