"""Tile configurations of the Hopper kernel: their limits, the heuristic choice by shape, and candidates to measure."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels._device import Device
from pallas_kernels.sparse_mlp.schedule import Split

PADDING = 8  # elements after each row in shared memory: puts eight consecutive rows in different banks
BATCHES = (16, 32, 64, 128)  # padded batch sizes; a larger batch is computed in pieces of 128
COPIES = ("bulk", "rows")
BIAS_PARTS = 3  # up-projection tiles whose biases a block loads when it starts
HIDDEN_WIDTH = 32  # columns of hidden values that a fused kernel completes at a time
SMEM_RESERVE = 2048  # bytes for barriers and for the compiler


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A configuration.

    Attributes:
      batch: padded batch size, N of the matrix products.
      warpgroups: how many multiply; each owns 64 rows of a stage.
      groups: stages of rows that the up-projection accumulates together, to read the input once for all of them.
      cols: columns of a stage: contraction columns in the up-projection, output columns in the down-projection.
      stages: depth of the weight ring buffer.
      x_cols, x_slots: columns and depth of the input's ring buffer.
      blocks: the most thread blocks to launch.
      fused: one kernel whose blocks wait for each other, and so must all run at once; False for one per projection.
      copy: how rows are gathered: "bulk" (one cp.async.bulk per row, in inline PTX), or "rows" (Pallas's own copy:
        slow, but the interpreter can run it).
    """

    batch: int
    warpgroups: int = 1
    groups: int
    cols: int
    stages: int
    x_cols: int
    x_slots: int
    blocks: int
    copy: str = "bulk"
    fused: bool = True

    def __post_init__(self) -> None:
        problems = [
            (self.batch in BATCHES, f"batch must be one of {BATCHES}"),
            (self.warpgroups in (1, 2), "warpgroups must be 1 or 2"),
            (self.cols % (64 * self.warpgroups) == 0, "cols must be a multiple of 64 per warpgroup"),
            (
                self.x_cols % 64 == 0 and self.cols % self.x_cols == 0,
                "x_cols must be a multiple of 64 that divides cols",
            ),
            (
                self.x_slots > self.cols // self.x_cols - (self.groups == 1),
                "x_slots must hold more than one chunk",
            ),
            (min(self.groups, self.stages, self.blocks) > 0, "groups, stages and blocks must be positive"),
            (self.copy in COPIES, f"copy must be one of {COPIES}"),
            (not (self.fused and self.copy == "rows"), "rows can't be fused"),
            (self.hidden_slots > 1, "the input's ring is too small for two stages of hidden values"),
            (
                max(self.groups, self.cols // 64 // self.warpgroups) * self.batch <= 256,
                "sums need too many registers",
            ),
            (self.smem_bytes <= 232448, "too much shared memory"),
        ]
        for fine, problem in problems:
            if not fine:
                raise ValueError(f"sparse_mlp tiles: {problem}; got {self}")

    @property
    def rows(self) -> int:
        """Number of weight rows in a stage."""
        return 64 * self.warpgroups

    @property
    def marked(self) -> bool:
        """Whether blocks wait on marks instead of semaphores; two warpgroups would spill registers with marks."""
        return self.fused and self.warpgroups == 1

    @property
    def hidden_slots(self) -> int:
        """Number of stages of hidden values that fit in the memory of the input's ring."""
        return min(4, self.x_cols * self.x_slots // self.rows)

    @property
    def smem_bytes(self) -> int:
        """Bytes of shared memory of the fused kernel, which needs the most."""
        ring = self.stages * self.rows * (self.cols + PADDING) * 2
        arrays = (
            ring,
            self.x_slots * self.batch * self.x_cols * 2,
            self.rows * self.groups * 4 * BIAS_PARTS,
            1,
            64 * min(self.batch, HIDDEN_WIDTH) * 2 if self.marked else 0,
        )
        return sum(-(-size // 1024) * 1024 for size in arrays) + SMEM_RESERVE


def padded(batch: int) -> int:
    """The smallest supported batch size that is at least `batch`, or else the largest."""
    return next((size for size in BATCHES if size >= batch), BATCHES[-1])


_CHOICE = {  # by padded batch size, for wide rows
    16: Tiles(batch=16, groups=2, cols=256, stages=6, x_cols=128, x_slots=5, blocks=132),
    32: Tiles(batch=32, groups=2, cols=256, stages=5, x_cols=128, x_slots=4, blocks=132),
    64: Tiles(batch=64, groups=2, cols=256, stages=5, x_cols=64, x_slots=6, blocks=132),
    128: Tiles(batch=128, warpgroups=2, groups=2, cols=256, stages=2, x_cols=64, x_slots=5, blocks=132),
}
# Fitted to bench/results/sparse_mlp.jsonl (OPT-66B, batch 16 and 64, density .1, .3, 1 on an H200): one group is fastest
# at batch 64 and density .1, two at batch 16 and density .1, four at higher densities.
INPUT_COST = 0.25  # cost of an input element (from L2), in weight elements (from device memory)
SUM_COST = 256 / 48  # times batch²: cost of one more partial sum per tile, in weight elements


def heuristic(batch: int, d_model: int, device: Device, *, selected: int, gated: bool = False) -> Tiles:
    """The tiles for a call: the valid configuration whose busiest block reads the least.

    Args:
      batch: at most 128; a larger batch is computed in pieces.
      d_model: a multiple of 128.
      device: the device to run on; its number of multiprocessors matters.
      selected: length of the index.
      gated: whether the up-projection has two matrices.
    """

    def cost(tiles: Tiles) -> float:
        stages = -(-selected // tiles.rows)
        row_tiles = -(-stages // tiles.groups) * (2 if gated else 1)
        going_up = Split(row_tiles, d_model // tiles.cols, tiles.blocks)
        up, sums = going_up.max_units, going_up.contributions.shape[1]
        down = Split(d_model // tiles.cols, stages, tiles.blocks).max_units
        rows = up * (tiles.groups * tiles.rows + INPUT_COST * tiles.batch) + down * tiles.rows
        return rows * tiles.cols + SUM_COST * tiles.batch**2 * sums

    known = replace(_CHOICE[padded(batch)], blocks=device.num_sms)
    fitting = known if d_model % known.cols == 0 else _narrower(known)
    return min(_variants(fitting, [{"groups": groups} for groups in (2, 1, 4)]), key=cost)


def _narrower(tiles: Tiles) -> Tiles:
    cols = tiles.cols // 2
    x_cols = min(tiles.x_cols, cols // 2)
    return replace(tiles, cols=cols, stages=tiles.stages + 1, x_cols=x_cols, x_slots=384 // x_cols)


def _variants(tiles: Tiles, changes: Iterable[dict[str, Any]]) -> list[Tiles]:
    """`tiles` with each of the changes, leaving out invalid and repeated configurations."""
    found: dict[Tiles, None] = {}
    for change in changes:
        with contextlib.suppress(ValueError):
            found[replace(tiles, **change)] = None
    return list(found)


def candidates(
    batch: int, d_model: int, device: Device, *, selected: int, gated: bool = False
) -> list[Tiles]:
    """Configurations worth measuring for a shape; the first is the heuristic's."""
    best = heuristic(batch, d_model, device, selected=selected, gated=gated)
    halved = {"cols": best.cols // 2, "x_cols": max(64, best.x_cols // 2)}
    doubled = {"cols": best.cols * 2, "x_cols": best.x_cols * 2}
    changes: tuple[dict[str, Any], ...] = (
        {},
        halved | {"stages": best.stages * 2},
        doubled | {"stages": best.stages // 2},
        {"groups": max(1, best.groups // 2)},
        {"groups": best.groups * 2},
        {"stages": max(2, best.stages - 2)},
        {"warpgroups": 2, "groups": max(1, best.groups // 2), "stages": max(2, best.stages // 2)},
        {"fused": False},
    )
    return [tiles for tiles in _variants(best, changes) if d_model % tiles.cols == 0]
