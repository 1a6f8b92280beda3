"""Shapes of the Hopper selection kernel: one thread block a row, the row in registers, four neighbours a quad."""

MAX_ROW = 36864  # entries of a row: 36 registers a thread, of its 64
POOL_LIMIT = 4  # rows that one block sums as fast as a kernel of its own would


def warpgroups(n: int) -> int:
    """Of 128 threads each, for a row of n entries."""
    return 1 if n <= 512 else 8


def quads(n: int) -> int:
    """Runs of four neighbouring entries that a thread holds."""
    return -(-n // (512 * warpgroups(n)))


def padded(n: int) -> int:
    """Entries that a row takes in the kernel."""
    return 512 * warpgroups(n) * quads(n)


def digit(n: int) -> int:
    """Bits that a pass settles: two bins a thread."""
    return 7 + warpgroups(n).bit_length()
