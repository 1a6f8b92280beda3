"""One call of the Mosaic kernels, all of it static: shapes, tiles, and who computes what."""

from dataclasses import dataclass
from functools import cached_property

from pallas_kernels.sparse_mlp.schedule import Split
from pallas_kernels.sparse_mlp.tiles import Tiles


@dataclass(frozen=True)
class Phase:
    """Row tiles `first` to `first + rows` of the up-projection, of every matrix; `parts`: number of its first partial sum.

    Matrix m's tile i of the phase is tile `m · rows + i` of the split.
    """

    split: Split
    first: int
    rows: int
    parts: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """batch B, d_model D, num_neurons F, selected k; gated: two matrices in the up-projection; activation: its name."""

    batch: int
    d_model: int
    num_neurons: int
    selected: int
    gated: bool
    activation: str
    dtype: str
    tiles: Tiles

    @cached_property
    def groups(self) -> int:
        """Stages of rows that hold the selected neurons."""
        return -(-self.selected // self.tiles.rows)

    @cached_property
    def row_tiles(self) -> int:
        """Output tiles of one matrix in the up-projection."""
        return -(-self.groups // self.tiles.groups)

    @property
    def padded(self) -> int:
        """Entries of the index up to the end of the last output tile of the up-projection."""
        return self.row_tiles * self.tiles.groups * self.tiles.rows

    @cached_property
    def phases(self) -> tuple["Phase", ...]:
        """The up-projection, in the order of its phases."""
        late = min(round(self.tiles.late * self.row_tiles), self.row_tiles - 1)
        found, parts, first = [], 0, 0
        for rows in (self.row_tiles - late, late):
            if rows:
                tiles = rows * (2 if self.gated else 1)
                split = Split(tiles, self.d_model // self.tiles.cols, self.tiles.blocks)
                found.append(Phase(split, first, rows, parts))
                parts, first = parts + split.blocks * split.max_parts, first + rows
        return tuple(found)

    @property
    def early(self) -> int:
        """Stages of rows whose hidden values the first phase gives."""
        return min(self.phases[0].rows * self.tiles.groups, self.groups)

    @cached_property
    def down(self) -> Split:
        return Split(self.d_model // self.tiles.cols, self.groups, self.tiles.blocks)

    @property
    def grid(self) -> int:
        """Thread blocks to launch, the same for either product and for both."""
        return max(self.down.blocks, *(phase.split.blocks for phase in self.phases))

    @property
    def up_parts(self) -> tuple[int, int, int, int]:
        """Shape of the partial sums of the up-projection, in blocks of 64 neurons."""
        t = self.tiles
        parts = sum(phase.split.blocks * phase.split.max_parts for phase in self.phases)
        return (parts, t.groups * t.warpgroups, 64, t.batch)

    @property
    def hidden(self) -> tuple[int, int, int]:
        """Shape of the hidden values, in blocks of 64 neurons."""
        return (self.groups * self.tiles.warpgroups, 64, self.tiles.batch)

    @property
    def down_parts(self) -> tuple[int, int, int, int]:
        """Shape of the partial sums of the down-projection, in blocks of 64 columns."""
        t = self.tiles
        return (self.down.blocks * self.down.max_parts, t.cols // 64, t.batch, 64)
