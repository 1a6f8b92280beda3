"""What several verbs read alike: seeds, sizes, a model directory with its tokenizer, texts cut into token windows."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from polarjax import checkpoint, data
from polarjax.errors import CheckpointError, InputError
from polarjax.tokenizer import Tokenizer
from polarjax.types import Array, Int, Key

DTYPES = ("float32", "bfloat16", "float16")
MOST_GIGABYTES = 1e9  # more than any device or disk has
SEEDS = range(-(2**63), 2**63)  # what JAX takes


def random_key(seed: int) -> Key[Array, ""]:
    """The random key of `--seed`; raises `InputError` if JAX has none for it."""
    if seed not in SEEDS:
        expected = f"{SEEDS[0]} to {SEEDS[-1]}"
        raise InputError("no such seed", where="--seed", got=seed, expected=expected, mend="give 0, 1, 2, …")
    return jax.random.key(seed)


def bytes_of(gigabytes: float, option: str) -> int:
    """How many bytes the number given for `option` is; raises `InputError` if it is no size."""
    if not 0 <= gigabytes <= MOST_GIGABYTES:  # NaN is neither
        expected = f"gigabytes, at most {MOST_GIGABYTES:,.0f}"
        raise InputError(
            "not a size", where=option, got=gigabytes, expected=expected, mend="give a number such as 5"
        )
    return int(gigabytes * 1e9)


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
