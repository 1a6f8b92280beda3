"""What several verbs read alike: a model directory with its tokenizer, and texts cut into token windows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polarjax import checkpoint, data
from polarjax.errors import CheckpointError, InputError
from polarjax.tokenizer import Tokenizer
from polarjax.types import Int

DTYPES = ("float32", "bfloat16", "float16")


def load_with_tokenizer(folder: Path, dtype: str | None = None) -> tuple[checkpoint.Bundle, Tokenizer]:
    """The model directory `folder` and its tokenizer; `dtype` None keeps the stored one.

    Raises:
      CheckpointError: the directory is missing or damaged, or has no tokenizer.
      InputError: `dtype` is no dtype that a decoder can have.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError("no such dtype", where="--dtype", got=dtype, expected=" | ".join(DTYPES))
    bundle = checkpoint.load(folder, dtype=dtype)
    if bundle.tokenizer is None:
        raise CheckpointError(
            "the model directory has no tokenizer, and text needs one",
            where=folder / "tokenizer",
            mend="put the tokenizer's HuggingFace files there",
        )
    return bundle, bundle.tokenizer


def text_windows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, *, most: int | None = None, source: str
) -> Int[np.ndarray, "n T"]:
    """Windows of `length` tokens of all `texts`, each begun by BOS where the tokenizer has one.

    Args:
      texts: documents, or several parted by form feeds.
      tokenizer: of the model.
      length: T, BOS included.
      most: at most so many windows, evenly spread over the text; None takes all.
      source: what an error calls the texts.

    Raises:
      InputError: the text does not fill one window, or `length` or `most` is too small.
    """
    if most is not None and most < 1:
        raise InputError("no window is left", where=source, got=most, expected="at least 1 window")
    encode = lambda text: tokenizer.hf.encode(text, add_special_tokens=False, verbose=False)
    stream = data.token_stream(data.DOCUMENT_SEPARATOR.join(texts), encode, separator=tokenizer.bos_id)
    rows = data.windows(stream, length, first=tokenizer.bos_id, source=source)
    if most is None or len(rows) <= most:
        return rows
    return rows[np.arange(most) * len(rows) // most]
