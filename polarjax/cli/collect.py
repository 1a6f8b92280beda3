"""`polarjax collect`: record a model's activations on text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from polarjax.cli.inputs import load_with_tokenizer, text_windows
from polarjax.data import read_text
from polarjax.errors import InputError
from polarjax.model import Decoder
from polarjax.sparsity import collect as record
from polarjax.sparsity.collect import MAX_BYTES, plan_recording
from polarjax.sparsity.pipeline import CollectOptions, plan
from polarjax.tokenizer import Tokenizer
from polarjax.types import Int32
