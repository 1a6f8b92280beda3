"""Measures tile configurations on a GPU, and reads and writes files of the fastest ones."""

from pallas_kernels._tuned.lookup import VARIABLE, Entry, load, lookup, write

__all__ = ["VARIABLE", "Entry", "load", "lookup", "write"]
