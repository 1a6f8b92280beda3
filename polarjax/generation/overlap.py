"""Compiles the token loop so that independent kernels run concurrently."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

OVERLAP = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
"""Compiler options for your own decoding loop: `jax.jit(loop, compiler_options=polarjax.OVERLAP)`.

On a GPU, kernels of a CUDA graph then wait only for kernels whose results they read: routers and selection, which only
need a layer's input, run alongside attention. `generate` and `stream` use it if theirs is the outermost jit. Don't
use it for programs with independent `sparse_mlp` calls: their thread blocks wait for each other and must all be
resident at once.
"""


def overlapping_jit(function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **jit_options)`, compiled with `OVERLAP` on a GPU.

    Compiler options belong to the outermost jit: inside another trace this is plain `jax.jit`, and the outer program's
    options apply.
    """
    plain = jax.jit(function, **jit_options)
    overlapping = jax.jit(function, compiler_options=OVERLAP, **jit_options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nested = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        run = plain if nested or jax.default_backend() != "gpu" else overlapping
        return run(*args, **kwargs)

    return call
