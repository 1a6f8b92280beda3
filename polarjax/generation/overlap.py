"""Compilation of the token loop so that kernels which don't need each other run at the same time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

OVERLAP = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
"""Compiler options for a decoding loop of your own: `jax.jit(loop, compiler_options=polarjax.OVERLAP)`.

On a GPU, the kernels of a CUDA graph then wait only for those whose results they read: routers and selection, which
need no more than a layer's input, run beside attention. `generate` and `stream` are compiled so where theirs is the
outermost jit. Not for programs in which one `sparse_mlp` doesn't depend on another: its thread blocks wait for each
other and must all fit on the card at a time.
"""


def overlapping_jit(function: Callable[..., Any], **jit_options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **jit_options)`, compiled with `OVERLAP` on a GPU.

    Compiler options belong to the outermost jit: called while something else is traced, this is plain `jax.jit`, and
    the options of that outer program count.
    """
    plain = jax.jit(function, **jit_options)
    overlapping = jax.jit(function, compiler_options=OVERLAP, **jit_options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nested = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        run = plain if nested or jax.default_backend() != "gpu" else overlapping
        return run(*args, **kwargs)

    return call
