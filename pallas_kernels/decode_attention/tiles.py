"""Tile configurations of the Hopper kernel: what each needs, which to use, and which are worth measuring."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pallas_kernels._device import Device
from pallas_kernels._tuned import lookup as tuned

OP = "sparse_decode_attention"

SM_SMEM = 233472  # bytes of shared memory of one Hopper multiprocessor
BLOCK_RESERVE = 1024  # bytes that each resident thread block costs on top of its own
WIDE = 64  # rows of one wgmma
MAX_HEADS = 64
MAX_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The static shape of a call: B K G H S, and `selected` groups per sequence (= K when dense)."""

    batch: int
    groups: int
    queries: int
    width: int
    capacity: int
    selected: int

    def __post_init__(self) -> None:
        if min(self.batch, self.groups, self.queries, self.width, self.capacity, self.selected) < 1:
            raise ValueError(f"attention problem: every size must be positive; got {self}")

    @classmethod
    def of(cls, q_shape: tuple[int, ...], k_shape: tuple[int, ...], selected: int) -> "Problem":
        batch, groups, queries, width = q_shape
        return cls(
            batch=batch, groups=groups, queries=queries, width=width, capacity=k_shape[2], selected=selected
        )

    @property
    def heads(self) -> int:
        """Query heads per group, rounded up to a multiple of 8 for wgmma."""
        return -(-self.queries // 8) * 8

    @property
    def swizzle(self) -> int:
        """Bytes of the widest shared-memory swizzle that divides a head."""
        return next(s for s in (128, 64, 32) if 2 * self.width % s == 0)

    @property
    def padded_width(self) -> int:
        """Columns of a query or result in shared memory: H, rounded up to whole wgmma rows."""
        return -(-self.width // WIDE) * WIDE

    @property
    def value_width(self) -> int:
        """Columns of a value tile in shared memory: H, but at least the rows of one wgmma."""
        return max(self.width, WIDE)

    @property
    def row_pieces(self) -> tuple[int, ...]:
        """First head dimension of each 64-row piece of the result; the last two overlap when H % 64 != 0."""
        last = self.value_width - WIDE
        return (*range(0, last, WIDE), last)

    @property
    def part_words(self) -> int:
        """float32 words of a split's result: each thread's share of the pieces [64, heads] and of [heads]."""
        return 128 * (2 * len(self.row_pieces) + 1) * self.heads // 4

    def require_supported(self) -> None:
        """Raises NotImplementedError for a shape that the kernel can't do."""
        if self.width % 16 or self.width > MAX_WIDTH:
            raise NotImplementedError(
                f"head width must be a multiple of 16 up to {MAX_WIDTH}; got {self.width}"
            )
        if self.queries > MAX_HEADS:
            raise NotImplementedError(f"at most {MAX_HEADS} query heads per group; got {self.queries}")
        if self.capacity % 8:
            raise NotImplementedError(f"cache capacity must be a multiple of 8; got {self.capacity}")


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """block: cache positions per step. stages: steps in flight. splits: thread blocks (one cluster) per group."""

    block: int = 64
    stages: int = 3
    splits: int = 1

    def __post_init__(self) -> None:
        if self.block not in (64, 128, 256):
            raise ValueError(f"attention tiles: block must be 64, 128 or 256; got {self.block}")
        if not 1 <= self.stages <= 16:
            raise ValueError(f"attention tiles: stages must be 1 to 16; got {self.stages}")
        if not 1 <= self.splits <= 8:
            raise ValueError(f"attention tiles: splits must be 1 to 8 (a cluster); got {self.splits}")

    def smem_bytes(self, problem: Problem) -> int:
        """Upper bound on the shared memory of one thread block, in bytes."""
        ring = self.stages * self.block * (problem.width + problem.value_width)
        small = problem.heads * (3 * problem.padded_width + self.block)
        parts = (self.splits - 1) * problem.part_words
        return 2 * (ring + small) + 4 * parts + 3 * 1024

    def resident(self, problem: Problem) -> int:
        """Thread blocks that fit on one multiprocessor at a time."""
        return SM_SMEM // (self.smem_bytes(problem) + BLOCK_RESERVE)

    def fits(self, problem: Problem, device: Device) -> bool:
        return self.smem_bytes(problem) <= device.smem_bytes

    def require_fit(self, problem: Problem, device: Device) -> None:
        """Raises ValueError when `device` has less shared memory than these tiles need."""
        if not self.fits(problem, device):
            need, have = self.smem_bytes(problem), device.smem_bytes
            raise ValueError(f"attention tiles: {self} needs {need} B of shared memory; got {have} B")


def search_space(problem: Problem, device: Device) -> Iterator[Tiles]:
    """Every configuration worth measuring for `problem`."""
    for block in (64, 128, 256):
        for stages in range(1, 9):
            for splits in (1, 2, 3, 4, 8):
                tiles = Tiles(block=block, stages=stages, splits=splits)
                if tiles.fits(problem, device) and splits * block <= max(problem.capacity, block):
                    yield tiles


def choose(problem: Problem, dtype: str, device: Device) -> Tiles:
    """The configuration to use: the fastest one measured for exactly this call and device, else the heuristic's.

    Raises ValueError if the measured configuration in the file is invalid or does not fit.
    """
    entry = tuned.lookup(OP, device.kind, dtype, vars(problem))
    if entry is None:
        return heuristic(problem, device)
    try:
        tiles = Tiles(**entry.tiles)
    except TypeError as error:
        raise ValueError(
            f"attention tiles: wrong names in a file of tuned tiles; got {dict(entry.tiles)}"
        ) from error
    tiles.require_fit(problem, device)
    return tiles


def heuristic(
    problem: Problem, device: Device, *, block: int | None = None, stages: int | None = None
) -> Tiles:
    """The configuration to use for a problem that was not measured; `block` and `stages` may be fixed.

    Considers the three rings that were fastest on an H200 at H = 128 (bench/results/decode_attention_sweep.jsonl), two
    of them also with splits, and takes the one that `_finish_time` expects to finish first if all sequences are equally
    long. If that gives more than half of the multiprocessors one thread block each, no other work would hide the longest
    sequence's: then it gets `UNEVEN_SPLITS`.
    """
    rings = ((block or 64, stages),) if block or stages else RINGS
    choices = [tiles for ring in rings for tiles in _splits(problem, device, *ring)]
    best = min(choices, key=lambda tiles: _finish_time(problem, tiles, device))
    divided, blocks = replace(best, splits=UNEVEN_SPLITS), problem.batch * problem.selected
    alone = best.splits == 1 < problem.batch and device.num_sms < 2 * blocks <= 2 * device.num_sms
    return divided if alone and divided in choices else best


RINGS: tuple[tuple[int, int | None], ...] = ((128, 2), (64, 2), (64, 3))
UNEVEN_SPLITS = 4
"""1 to 6 % slower if all sequences are as long as the cache, 19 to 40 % faster if log-uniform from S/32 to S."""

UNSPLIT = (64, 3)  # its splits were always slower than those of the other two


def _splits(problem: Problem, device: Device, block: int, stages: int | None) -> list[Tiles]:
    """Configurations with that ring that fit; its depth is `stages` or, if None, 2 if that fits, else 1."""
    wanted = (stages,) if stages else (2, 1)
    whole = next((t for n in wanted if (t := Tiles(block=block, stages=n)).fits(problem, device)), None)
    if whole is None:
        return [Tiles(block=block, stages=1)] if block == 64 else []
    counts = (1,) if (block, stages) == UNSPLIT else (1, 2, 3, 4, 8)
    even = (
        -(-problem.capacity // block) % 3 == 0
    )  # otherwise, 3 splits would give some thread blocks an extra step
    divided = (
        replace(whole, splits=n)
        for n in counts
        if (n == 1 or n * 2 * block <= problem.capacity) and (n != 3 or even)
    )
    return [tiles for tiles in divided if tiles.fits(problem, device)]


BYTES_PER_US = 4.4e6  # read rate of an H200
IN_FLIGHT = 10e6  # bytes in flight needed for that rate
CLUSTER_ROOM = 0.9  # usable share of thread block slots: a cluster must fit in one group of multiprocessors
WIDE_GAIN = 0.97  # relative time with blocks of 128 positions, which need half as many steps


def _finish_time(problem: Problem, tiles: Tiles, device: Device) -> float:
    """Expected microseconds until the last thread block ends, if the running ones share an H200's bandwidth equally."""
    blocks, sms = problem.batch * problem.selected * tiles.splits, device.num_sms
    slots = max(1, int(sms * tiles.resident(problem) * (CLUSTER_ROOM if tiles.splits > 1 else 1)))
    saturating = IN_FLIGHT / (4 * tiles.stages * tiles.block * problem.width)
    waves, rest = divmod(blocks, slots)
    share = (waves * slots + (max(rest, saturating) if rest else 0)) / blocks
    if not waves and blocks > sms:  # some multiprocessors have more thread blocks, which deep rings slow down
        share *= (-(-blocks // sms) * sms / blocks) ** (0.15 * (tiles.stages - 1))
    if tiles.block > 64:
        share *= WIDE_GAIN
    merging = 0.0
    if tiles.splits > 1:
        steps = -(-problem.capacity // tiles.block)
        share *= (1 + 0.06 * tiles.splits) * -(-steps // tiles.splits) * tiles.splits / steps
        merging = (0.8 + 0.05 * tiles.splits) * -(-blocks // slots)
    cache = 4 * problem.batch * problem.selected * problem.capacity * problem.width
    return share * cache / BYTES_PER_US + merging
