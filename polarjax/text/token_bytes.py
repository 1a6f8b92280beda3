"""Counts the bytes and words of text that each token stands for."""

import re
from typing import Any

import numpy as np

from polarjax.text.decoding import decoder_types
from polarjax.types import Int

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WORD = re.compile(r"\S+")
_SPACE = "▁"  # a space, in SentencePiece's vocabularies


def encode_with_bytes(hf: Any, text: str) -> tuple[Int[np.ndarray, "tokens"], Int[np.ndarray, "tokens"]]:
    """The token ids of `text` without added special tokens, and the UTF-8 bytes that each stands for.

    The bytes of all tokens add up to the text's. Spaces that the tokenizer trims count for the next token, or for the
    last one at the end. A character shared by several tokens is divided among them by their own bytes.

    Args:
      hf: the transformers tokenizer.
      text: the text to encode.

    Returns:
      ids int32 and bytes int64, both [tokens].
    """
    ids, spans = _encode(hf, text)
    if not len(ids):
        return ids, np.zeros(0, np.int64)
    position = _byte_positions(text)
    ends = np.maximum.accumulate(spans[:, 1])
    ends[-1] = len(text)
    is_first = np.ones(len(ids), bool)  # of a run of tokens that share characters
    is_first[1:] = spans[1:, 0] >= ends[:-1]
    run = np.cumsum(is_first) - 1
    last = np.append(np.flatnonzero(is_first)[1:], len(ids)) - 1
    run_end = position[ends[last]]
    run_start = np.append(0, run_end[:-1])
    following = np.cumsum(_own_bytes(hf, ids))
    following = following[last][run] - following  # own bytes of the tokens after each one, within its run
    stop = np.maximum(run_end[run] - following, run_start[run])
    return ids, np.diff(stop, prepend=0)


def words_of(text: str, num_bytes: Int[np.ndarray, "tokens"]) -> Int[np.ndarray, "tokens"]:
    """How many of the text's words, separated by white space, begin in each token of `num_bytes` bytes, [tokens]."""
    starts = _byte_positions(text)[[match.start() for match in _WORD.finditer(text)]]
    ends = np.cumsum(num_bytes)
    return np.diff(np.searchsorted(starts, ends), prepend=0)


def _encode(hf: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [tokens] and the characters [start, end) of each, [tokens 2]; the whole text if unknown."""
    options = {"add_special_tokens": False, "verbose": False}
    if not hf.is_fast:
        ids = np.asarray(hf.encode(text, **options), np.int32)
        return ids, np.tile(np.array([0, len(text)]), (len(ids), 1))
    encoded = hf(text, return_offsets_mapping=True, **options)
    spans = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.asarray(encoded["input_ids"], np.int32), spans


def _byte_positions(text: str) -> np.ndarray:
    """Where each character begins in the UTF-8 text, and its length: [characters + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.append(0, np.cumsum(sizes))


def _own_bytes(hf: Any, ids: np.ndarray) -> np.ndarray:
    """The bytes that each token stands for by its own name in the vocabulary, [tokens]."""
    unique, inverse = np.unique(ids, return_inverse=True)
    is_byte_level = "ByteLevel" in decoder_types(hf)  # its names have one character per byte

    def size(name: str) -> int:
        if is_byte_level:
            return len(name)
        return 1 if _BYTE.fullmatch(name) else len(name.replace(_SPACE, " ").encode())

    return np.array([size(name) for name in hf.convert_ids_to_tokens(unique.tolist())], np.int64)[inverse]
