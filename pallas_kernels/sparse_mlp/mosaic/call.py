"""One call of the Mosaic kernels: its static shapes, tiles and activation, and which block computes what."""

from dataclasses import dataclass
from functools import cached_property

from pallas_kernels.sparse_mlp.schedule import Split
from pallas_kernels.sparse_mlp.tiles import BIAS_PARTS, Tiles


@dataclass(frozen=True, kw_only=True)
class Call:
    """The static arguments of one call.

    Attributes:
      batch, d_model, num_neurons, selected: B, D, F and k.
      gated: whether the up-projection has two matrices.
      activation: "relu" or "silu".
      threshold: with "relu", the value that a pre-activation must exceed to be kept.
      dtype: of operands and result, "bfloat16" or "float16".
      tiles: the configuration.
    """

    batch: int
    d_model: int
    num_neurons: int
    selected: int
    gated: bool
    activation: str
    threshold: float
    dtype: str
    tiles: Tiles

    @cached_property
    def groups(self) -> int:
        """Number of stages that hold the rows of all selected neurons."""
        return -(-self.selected // self.tiles.rows)

    @cached_property
    def row_tiles(self) -> int:
        """Number of output tiles for one matrix of the up-projection."""
        return -(-self.groups // self.tiles.groups)

    @property
    def padded(self) -> int:
        """Length of the index, rounded up to whole output tiles of the up-projection."""
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
        """Number of up-projection tiles whose biases a block loads when it starts."""
        return min(BIAS_PARTS, self.up.max_parts)

    @property
    def grid(self) -> int:
        """Number of thread blocks to launch, whichever products the kernel computes."""
        return max(self.up.blocks, self.down.blocks)

    @property
    def semaphores(self) -> int:
        """Number of semaphores in a fused kernel.

        Semaphore 0 counts blocks whose hidden values are complete. With marks, semaphore 1 counts blocks that have
        placed theirs, and there are no others. Without marks, semaphore 1 counts warpgroups whose partial sums of the
        result are stored; then follow one semaphore for each up-projection tile (warpgroups that stored their partial
        sums of it) and one for each stage of rows (pieces of its hidden values).
        """
        return 2 if self.tiles.marked else 2 + self.up.tiles + self.groups

    @property
    def kind(self) -> str:
        """Dtype of the partial sums of the result: bfloat16 in a fused bfloat16 kernel, otherwise float32.

        float16 results need float32, because bfloat16 would be coarser than the result.
        """
        return "bfloat16" if self.tiles.fused and self.dtype == "bfloat16" else "float32"

    @property
    def result_fours(self) -> int:
        """Number of 4-word stores per thread for one 64-column partial sum of the result, in a fused kernel."""
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
        """Shape of the marked hidden values, in blocks of 64 neurons, laid out thread by thread."""
        return (self.groups * self.tiles.warpgroups, self.tiles.batch, 64)

    @property
    def down_parts(self) -> tuple[int, int, int, int]:
        """Shape of the partial sums of the down-projection, in blocks of 64 columns."""
        t = self.tiles
        return (self.down.blocks * self.down.max_parts, t.cols // 64, t.batch, 64)
