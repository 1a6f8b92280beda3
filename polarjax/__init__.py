"""Contextually sparse decoding of large language models in JAX."""

from importlib.metadata import version

from polarjax import costs, evaluation, sparsity
from polarjax.checkpoint.bundle import Bundle, load, save
from polarjax.configs import ModelConfig, RopeConfig
from polarjax.errors import CheckpointError, InputError, PolarjaxError, SparsityError, UnsupportedConfigError
from polarjax.generation.generate import generate
from polarjax.generation.overlap import OVERLAP
from polarjax.generation.sampling import Categorical, Greedy
from polarjax.generation.settings import GenerationSettings
from polarjax.generation.stream import TokenStream, stream
from polarjax.generation.token_loop import Generation
from polarjax.model.cache import KVCache, init_cache
from polarjax.model.decoder import Decoder, decode_step, forward, prefill
from polarjax.selection.plans import PlanTable, SparsityPlan
from polarjax.selection.selectors import Sparsity
from polarjax.text.assembly import Completion, TextStream

__version__ = version("polarjax")

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
