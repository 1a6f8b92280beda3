"""Contextually sparse decoding of large language models in JAX."""

from polarjax import costs, evaluation, sparsity
from polarjax.cache import KVCache, init_cache
from polarjax.checkpoint import Bundle, load, save
from polarjax.configs import ModelConfig, RopeConfig
from polarjax.errors import CheckpointError, InputError, PolarjaxError, SparsityError, UnsupportedConfigError
from polarjax.generate import generate
from polarjax.generation_config import GenerationSettings
from polarjax.model import Decoder, decode_step, forward, prefill
from polarjax.overlap import OVERLAP
from polarjax.sampling import Categorical, Greedy
from polarjax.sparsity.plan import PlanTable, SparsityPlan
from polarjax.sparsity.select import Sparsity
from polarjax.streaming import TokenStream, stream
from polarjax.text import Completion, TextStream
from polarjax.token_loop import Generation

__version__ = "0.1.0"

__all__ = [
    "OVERLAP",
    "Bundle",
    "Categorical",
    "CheckpointError",
    "Completion",
    "Decoder",
    "Generation",
    "GenerationSettings",
    "Greedy",
    "InputError",
    "KVCache",
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
    "evaluation",
    "forward",
    "generate",
    "init_cache",
    "load",
    "prefill",
    "save",
    "sparsity",
    "stream",
]
