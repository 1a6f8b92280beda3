"""Converts HuggingFace checkpoints into polarjax model directories."""

from checkpoints_convert.convert import Conversion, config_from_hf, convert_checkpoint
from polarjax.errors import UnsupportedConfigError

__all__ = ["Conversion", "UnsupportedConfigError", "config_from_hf", "convert_checkpoint"]
