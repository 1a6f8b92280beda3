"""Contextually sparse decoding of large language models in JAX.

A name is imported when it is first used: `import polarjax` by itself imports neither JAX nor a model.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

import ml_dtypes as _  # noqa: F401  from here on, bfloat16 is a dtype of NumPy

from polarjax.lazy import lazy_names

if TYPE_CHECKING:
    from polarjax import costs, distributed, evaluation, jobs, sparsity
    from polarjax.checkpoint.bundle import Bundle, save
    from polarjax.checkpoint.loading import load
    from polarjax.checkpoint.placement import shard
    from polarjax.configs import ModelConfig, RopeConfig
    from polarjax.engine.engine import Engine
    from polarjax.engine.requests import Event
    from polarjax.errors import (
        CheckpointError,
        InputError,
        PolarjaxError,
        SparsityError,
        UnsupportedConfigError,
    )
    from polarjax.generation.generate import generate
    from polarjax.generation.overlap import OVERLAP, loop_options
    from polarjax.generation.sampling import Categorical, Greedy
    from polarjax.generation.settings import GenerationSettings
    from polarjax.generation.stream import TokenStream, stream
    from polarjax.generation.token_loop import Generation
    from polarjax.model.cache import KVCache, init_cache
    from polarjax.model.decoder import Decoder, decode_step, forward, prefill
    from polarjax.model.layout import Layout
    from polarjax.selection.plans import PlanTable, SparsityPlan
    from polarjax.selection.selectors import Sparsity
    from polarjax.text.assembly import Completion, TextStream
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "polarjax.costs": "",
            "polarjax.distributed": "",
            "polarjax.evaluation": "",
            "polarjax.jobs": "",
            "polarjax.sparsity": "",
            "polarjax.checkpoint.bundle": "Bundle save",
            "polarjax.checkpoint.loading": "load",
            "polarjax.checkpoint.placement": "shard",
            "polarjax.configs": "ModelConfig RopeConfig",
            "polarjax.engine.engine": "Engine",
            "polarjax.engine.requests": "Event",
            "polarjax.errors": (
                "CheckpointError InputError PolarjaxError SparsityError UnsupportedConfigError"
            ),
            "polarjax.generation.generate": "generate",
            "polarjax.generation.overlap": "OVERLAP loop_options",
            "polarjax.generation.sampling": "Categorical Greedy",
            "polarjax.generation.settings": "GenerationSettings",
            "polarjax.generation.stream": "TokenStream stream",
            "polarjax.generation.token_loop": "Generation",
            "polarjax.model.cache": "KVCache init_cache",
            "polarjax.model.decoder": "Decoder decode_step forward prefill",
            "polarjax.model.layout": "Layout",
            "polarjax.selection.plans": "PlanTable SparsityPlan",
            "polarjax.selection.selectors": "Sparsity",
            "polarjax.text.assembly": "Completion TextStream",
        },
    )

__version__ = version("polarjax")

__all__ = [
    "OVERLAP",
    "Bundle",
    "Categorical",
    "CheckpointError",
    "Completion",
    "Decoder",
    "Engine",
    "Event",
    "Generation",
    "GenerationSettings",
    "Greedy",
    "InputError",
    "KVCache",
    "Layout",
    "ModelConfig",
    "PlanTable",
    "PolarjaxError",
    "RopeConfig",
    "Sparsity",
    "SparsityError",
    "SparsityPlan",
    "TextStream",
    "TokenStream",
    "UnsupportedConfigError",
    "costs",
    "decode_step",
    "distributed",
    "evaluation",
    "forward",
    "generate",
    "init_cache",
    "jobs",
    "load",
    "loop_options",
    "prefill",
    "save",
    "shard",
    "sparsity",
    "stream",
]
