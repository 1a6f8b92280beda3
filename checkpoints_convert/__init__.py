"""Converts HuggingFace checkpoints to polarjax model directories. Only this package knows HuggingFace's names."""

from checkpoints_convert.convert import Conversion, convert_checkpoint
from checkpoints_convert.describe import Description, describe_checkpoint
from checkpoints_convert.export import Export, export_checkpoint
from checkpoints_convert.hf_config import config_from_hf
from polarjax.errors import UnsupportedConfigError

__all__ = [
    "Conversion",
    "Description",
    "Export",
    "UnsupportedConfigError",
    "config_from_hf",
    "convert_checkpoint",
    "describe_checkpoint",
    "export_checkpoint",
]
