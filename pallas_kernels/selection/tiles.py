"""Shapes of the Hopper selection kernel: one thread block per row, the row in registers, as quads of four neighbors."""

MAX_ROW = 36864  # entries of a row: 36 of a thread's 64 registers
POOL_LIMIT = 4  # the most rows that one block sums as fast as a separate kernel


def warpgroups(n: int) -> int:
    """Number of warpgroups, of 128 threads each, for a row of n entries."""
    return 1 if n <= 512 else 8


def quads(n: int) -> int:
    """Number of runs of four neighboring entries that a thread holds."""
    return -(-n // (512 * warpgroups(n)))


def padded(n: int) -> int:
    """Number of entries that the kernel pads a row to."""
    return 512 * warpgroups(n) * quads(n)


def digit(n: int) -> int:
    """Number of bits that a pass decides, with two bins per thread."""
    return 7 + warpgroups(n).bit_length()
