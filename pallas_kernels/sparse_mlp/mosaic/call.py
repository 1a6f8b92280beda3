"""One call of the Mosaic kernels, all of it static: shapes, tiles, and who computes what."""

from dataclasses import dataclass
from functools import cached_property

from pallas_kernels.sparse_mlp.schedule import Split
from pallas_kernels.sparse_mlp.tiles import BIAS_PARTS, Tiles


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
    def up(self) -> Split:
        tiles = self.row_tiles * (2 if self.gated else 1)
        return Split(tiles, self.d_model // self.tiles.cols, self.tiles.blocks)

    @cached_property
    def down(self) -> Split:
        return Split(self.d_model // self.tiles.cols, self.groups, self.tiles.blocks)

    @property
    def bias_parts(self) -> int:
        """Tiles going up of which a block brings the biases at its start."""
        return min(BIAS_PARTS, self.up.max_parts)

    @property
    def grid(self) -> int:
        """Thread blocks to launch, the same for either product and for both."""
        return max(self.up.blocks, self.down.blocks)

    @property
    def semaphores(self) -> int:
        """Of a fused kernel: hidden values of a block; then a block's marks, or else a warpgroup's partial sums of the
        result; one for each tile going up, a warpgroup's partial sums of it; one for each stage of rows, its hidden
        values.
        """
        return 2 if self.tiles.marked else 2 + self.up.tiles + self.groups

    @property
    def kind(self) -> str:
        """What partial sums of the result are kept as: in a fused kernel bfloat16 for a result of that type, but
        float32 for float16, for which it would be too coarse.
        """
        return "bfloat16" if self.tiles.fused and self.dtype == "bfloat16" else "float32"

    @property
    def result_fours(self) -> int:
        """Times four words of a thread that a fused kernel's partial sum of 64 columns of the result has."""
        return self.tiles.batch // (8 if self.kind == "float32" else 16)

    @property
    def up_parts(self) -> tuple[int, int, int, int]:
        """Shape of the partial sums of the up-projection, in blocks of 64 neurons."""
        t = self.tiles
        return (self.up.blocks * self.up.max_parts, t.groups * t.warpgroups, 64, t.batch)

    @property
    def hidden(self) -> tuple[int, int, int]:
        """Shape of the hidden values, in blocks of 64 neurons."""
        return (self.groups * self.tiles.warpgroups, 64, self.tiles.batch)

    @property
    def early(self) -> tuple[int, int, int]:
        """Shape of the marked hidden values, in blocks of 64 neurons, in the order of threads."""
        return (self.groups * self.tiles.warpgroups, self.tiles.batch, 64)

    @property
    def down_parts(self) -> tuple[int, int, int, int]:
        """Shape of the partial sums of the down-projection, in blocks of 64 columns."""
        t = self.tiles
        return (self.down.blocks * self.down.max_parts, t.cols // 64, t.batch, 64)
