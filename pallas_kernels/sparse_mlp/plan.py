"""One call of the Mosaic kernels, all of it static: shapes, tiles, and who computes what."""

from dataclasses import dataclass
from functools import cached_property

from pallas_kernels.sparse_mlp.schedule import Split
from pallas_kernels.sparse_mlp.tiles import Tiles


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

    @property
    def tile_groups(self) -> int:
        """Stages of rows of an output tile of the up-projection."""
        return self.tiles.groups * self.tiles.cluster

    @cached_property
    def row_tiles(self) -> int:
        """Output tiles of one matrix in the up-projection."""
        return -(-self.groups // self.tile_groups)

    @property
    def padded(self) -> int:
        """Entries of the index up to the end of the last output tile of the up-projection."""
        return self.row_tiles * self.tile_groups * self.tiles.rows

    @cached_property
    def up(self) -> Split:
        """Among the clusters: the blocks of one take the same chunks of neighbouring rows."""
        tiles = self.row_tiles * (2 if self.gated else 1)
        return Split(tiles, self.d_model // self.tiles.cols, self.tiles.blocks // self.tiles.cluster)

    @cached_property
    def down(self) -> Split:
        return Split(self.d_model // self.tiles.cols, self.groups, self.tiles.blocks)

    @property
    def clusters(self) -> int:
        """Clusters to launch, the same for either product and for both."""
        return max(self.up.blocks, -(-self.down.blocks // self.tiles.cluster))

    @property
    def grid(self) -> int:
        """Thread blocks in them."""
        return self.clusters * self.tiles.cluster

    @property
    def completers(self) -> int:
        """Warpgroups of a block that complete hidden values in a fused kernel."""
        return 1 + self.tiles.helping * self.tiles.warpgroups

    @property
    def sums(self) -> str:
        """How partial sums of the down-projection are stored; bfloat16 would be too coarse for float16."""
        if not self.tiles.fused:
            return "rows"
        return "float32" if self.tiles.sums == "bfloat16" != self.dtype else self.tiles.sums

    @property
    def up_parts(self) -> tuple[int, int, int, int]:
        """Shape of the partial sums of the up-projection, in blocks of 64 neurons."""
        t = self.tiles
        return (self.up.blocks * self.up.max_parts, self.tile_groups * t.warpgroups, 64, t.batch)

    @property
    def hidden(self) -> tuple[int, int, int]:
        """Shape of the hidden values, in blocks of 64 neurons."""
        return (self.groups * self.tiles.warpgroups, 64, self.tiles.batch)

    @property
    def down_parts(self) -> tuple[int, int, int, int]:
        """Shape of the partial sums of the down-projection, in blocks of 64 columns."""
        t = self.tiles
        return (self.down.blocks * self.down.max_parts, t.cols // 64, t.batch, 64)
