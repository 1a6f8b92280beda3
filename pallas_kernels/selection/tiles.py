"""Limits of the Hopper selection kernel: one thread block a row, the row in registers."""

WARPGROUPS = 8
THREADS = 128 * WARPGROUPS
MAX_ROW = 40960  # entries of a row: 40 registers a thread, and places that fit 16 bits
MIN_ROW = 257  # below, ranking in XLA is as fast


SPILLING = (24, 28)  # registers of a row a thread with which ptxas spills; one more and it does not


def padded(n: int) -> int:
    """Entries that a row takes in the kernel."""
    registers = -(-n // THREADS)
    return (registers + (registers in SPILLING)) * THREADS
