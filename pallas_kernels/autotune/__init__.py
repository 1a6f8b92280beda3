"""Tile configurations that were measured on a device: search, files of them, and what ships with the package."""

from pallas_kernels._tuned.lookup import VARIABLE, Entry, load, lookup, write

__all__ = ["VARIABLE", "Entry", "load", "lookup", "write"]
