"""Compiles the token loop for a GPU, with kernels that run concurrently and products that suit the number of rows."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from polarjax.numeric import whole_number

OVERLAP = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_dot_merger_threshold_mb": "160",
    "xla_gpu_experimental_use_collective_kernels": "",
}
"""`loop_options` of a few sequences, or of several GPUs.

On a GPU, kernels of a CUDA graph then wait only for kernels whose results they read: routers and selection, which
only need a layer's input, run alongside attention. Products of the same input become one. Over several GPUs, NCCL sums
instead of XLA's own kernels, which are slower here. `generate`, `stream` and the engine use these options if theirs is
the outermost jit. Don't use them for programs with independent `sparse_mlp` calls: their thread blocks wait for each
other and must all be resident at once.
"""

MANY_ROWS = 48
_WHOLE_PRODUCTS = {"xla_gpu_dot_merger_threshold_mb": "0", "xla_gpu_experimental_force_split_k": "1"}


def loop_options(batch_size: int) -> dict[str, str]:
    """Compiler options for your own decoding loop of so many sequences on one GPU.

    Pass them to the outermost jit: `jax.jit(loop, compiler_options=polarjax.loop_options(batch_size))`. They are
    `OVERLAP`; from 48 sequences on, each product is a kernel of its own and whole: adding up the parts that XLA
    would split it into, a kernel after it, takes longer the more rows there are.

    Args:
      batch_size: B, sequences of a step.

    Raises:
      InputError: batch_size isn't a whole number, at least 1.
    """
    batch_size = whole_number(batch_size, "batch_size", where="loop_options")
    return OVERLAP | (_WHOLE_PRODUCTS if batch_size >= MANY_ROWS else {})


class overlapping_jit:
    """`jax.jit(function, **jit_options)`, compiled with `loop_options` on a GPU.

    Compiler options belong to the outermost jit: inside another trace this is plain `jax.jit`, and the outer program's
    options apply.

    Args:
      function: to compile.
      rows: the array [B ...] among the arguments of a call whose first axis is the sequences of a step.
      jit_options: those of `jax.jit`.
    """

    def __init__(
        self, function: Callable[..., Any], *, rows: Callable[..., jax.Array], **jit_options: Any
    ) -> None:
        self._rows = rows
        self._plain = jax.jit(function, **jit_options)
        few, many = (loop_options(count) for count in (1, MANY_ROWS))
        self._few = jax.jit(function, compiler_options=few, **jit_options)
        self._many = jax.jit(function, compiler_options=many, **jit_options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(args, kwargs)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As of a function that `jax.jit` returned."""
        return self._of(args, kwargs).lower(*args, **kwargs)

    def _of(self, args: Any, kwargs: Any) -> Any:
        nested = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        if nested or jax.default_backend() != "gpu":
            return self._plain
        of_steps = self._rows(*args, **kwargs)
        alone = of_steps.sharding is None or len(of_steps.sharding.device_set) == 1
        return self._many if alone and of_steps.shape[0] >= MANY_ROWS else self._few
