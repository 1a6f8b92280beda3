from pallas_kernels.selection.api import select_top_k

__all__ = ["select_top_k"]
