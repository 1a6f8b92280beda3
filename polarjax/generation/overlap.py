"""Compiles the token loop so that independent kernels run concurrently."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

OVERLAP = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_dot_merger_threshold_mb": "160",
    "xla_gpu_experimental_use_collective_kernels": "",
}
"""Compiler options for your own decoding loop: `jax.jit(loop, compiler_options=polarjax.OVERLAP)`.

On a GPU, kernels of a CUDA graph then wait only for kernels whose results they read: routers and selection, which
only need a layer's input, run alongside attention. Products of the same input become one. Over several GPUs, NCCL sums
instead of XLA's own kernels, which are slower here. `generate` and `stream` use these options if theirs is the
outermost jit. Don't use them for programs with independent `sparse_mlp` calls: their thread blocks wait for each other
and must all be resident at once.
"""


class overlapping_jit:
    """`jax.jit(function, **jit_options)`, compiled with `OVERLAP` on a GPU.

    Compiler options belong to the outermost jit: inside another trace this is plain `jax.jit`, and the outer program's
    options apply.
    """

    def __init__(self, function: Callable[..., Any], **jit_options: Any) -> None:
        self._plain = jax.jit(function, **jit_options)
        self._overlapping = jax.jit(function, compiler_options=OVERLAP, **jit_options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(args, kwargs)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As of a function that `jax.jit` returned."""
        return self._of(args, kwargs).lower(*args, **kwargs)

    def _of(self, *operands: Any) -> Any:
        nested = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(operands))
        return self._plain if nested or jax.default_backend() != "gpu" else self._overlapping
