from pallas_kernels.all_reduce_norm.api import all_reduce_norm, connect
from pallas_kernels.all_reduce_norm.problem import Link

__all__ = ["Link", "all_reduce_norm", "connect"]
