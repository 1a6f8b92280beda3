"""How the Hopper kernel cuts its work: a configuration, its limits, the choice by shape, which are worth trying."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels._device import Device
from pallas_kernels.sparse_mlp.schedule import Split

PADDING = 8  # elements after each row in shared memory: eight rows meet eight different groups of banks
BATCHES = (16, 32, 64, 128)  # padded batch; a larger one is cut into pieces of the last
COPIES = ("bulk", "rows")
BIAS_PARTS = 3  # tiles going up whose biases a block holds from its start on
HIDDEN_WIDTH = 32  # columns of hidden values that are completed at once in a fused kernel
SMEM_RESERVE = 2048  # bytes for barriers and for the compiler


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """batch: padded batch, the N of the products. warpgroups: that multiply, each owning 64 of a stage's rows.
    groups: stages of rows whose sums are held together going up, so that the input is read once for all of them.
    cols: columns of a stage: of the contraction going up, of the output going down.
    stages: depth of the ring of weights. x_cols, x_slots: columns and depth of the input's ring.
    blocks: thread blocks at most. fused: one kernel whose blocks wait for each other and must therefore run at the
    same time, else one kernel a projection.
    copy: how rows are gathered: "bulk" (one cp.async.bulk each, in inline PTX) or "rows" (Pallas's own copy, slow,
    but the interpreter knows it).
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
            (self.cols % (64 * self.warpgroups) == 0, "cols must be a multiple of 64 a warpgroup"),
            (self.x_cols % 64 == 0 and self.cols % self.x_cols == 0, "x_cols must divide cols, by 64"),
            (
                self.x_slots > self.cols // self.x_cols - (self.groups == 1),
                "x_slots must hold one chunk and more",
            ),
            (min(self.groups, self.stages, self.blocks) > 0, "groups, stages and blocks must be positive"),
            (self.copy in COPIES, f"copy must be one of {COPIES}"),
            (not (self.fused and self.copy == "rows"), "rows can't be fused"),
            (self.hidden_slots > 1, "the input's ring is too small for two stages of hidden values"),
            (max(self.groups, self.cols // 64 // self.warpgroups) * self.batch <= 256, "sums need registers"),
            (self.smem_bytes <= 232448, "too much shared memory"),
        ]
        for fine, problem in problems:
            if not fine:
                raise ValueError(f"sparse_mlp tiles: {problem}; got {self}")

    @property
    def rows(self) -> int:
        """Rows of a stage."""
        return 64 * self.warpgroups

    @property
    def marked(self) -> bool:
        """Whether marks tell blocks what others have stored, instead of semaphores: two warpgroups would spill."""
        return self.fused and self.warpgroups == 1

    @property
    def hidden_slots(self) -> int:
        """Stages of hidden values that fit where the input was."""
        return min(4, self.x_cols * self.x_slots // self.rows)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of the fused kernel, the larger one."""
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
    """The smallest supported batch that holds `batch`, at most the largest."""
    return next((size for size in BATCHES if size >= batch), BATCHES[-1])


_CHOICE = {  # by padded batch, for wide rows
    16: Tiles(batch=16, groups=2, cols=256, stages=6, x_cols=128, x_slots=5, blocks=132),
    32: Tiles(batch=32, groups=2, cols=256, stages=5, x_cols=128, x_slots=4, blocks=132),
    64: Tiles(batch=64, groups=2, cols=256, stages=5, x_cols=64, x_slots=6, blocks=132),
    128: Tiles(batch=128, warpgroups=2, groups=2, cols=256, stages=2, x_cols=64, x_slots=5, blocks=132),
}
# Fitted to bench/results/sparse_mlp.jsonl (OPT-66B, batch 16 and 64, density .1, .3, 1 on an H200), where one stage
# of rows a group is fastest at batch 64 and density .1, two at batch 16 and .1, four beyond:
INPUT_COST = 0.25  # of a byte of the input, which lies in the L2, in bytes of weights
SUM_COST = 256 / 48  # times batch²: of one more partial sum a tile, in elements of weights


def heuristic(batch: int, d_model: int, device: Device, *, selected: int, gated: bool = False) -> Tiles:
    """Tiles for a batch of at most 128 and rows of d_model columns, which must be a multiple of 128.

    `selected`: entries of the index. Taken is the configuration that leaves the busiest block least to read.
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
    """Those of the changed configurations that are valid, without repetitions."""
    found: dict[Tiles, None] = {}
    for change in changes:
        with contextlib.suppress(ValueError):
            found[replace(tiles, **change)] = None
    return list(found)


def candidates(
    batch: int, d_model: int, device: Device, *, selected: int, gated: bool = False
) -> list[Tiles]:
    """Configurations worth measuring for a shape: the heuristic's first."""
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
