"""Token ids to text, including byte-fallback runs."""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


def decode(hf: Any, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of token ids, as `hf.decode` gives it, except in runs of byte tokens that are not UTF-8.

    There the tokenizers library replaces the whole run, so one more byte changes earlier characters. Like
    SentencePiece, this function keeps complete characters and replaces every other byte by U+FFFD.

    Args:
      hf: the transformers tokenizer.
      ids: token ids of one sequence.
      skip_special_tokens: whether special tokens are left out.
    """
    text = hf.decode(list(ids), skip_special_tokens=skip_special_tokens)
    if _REPLACEMENT not in text or not falls_back_to_bytes(hf):
        return text
    backend = hf.backend_tokenizer
    skipped = special_ids(hf) if skip_special_tokens else frozenset()
    tokens = [backend.id_to_token(i) for i in ids if i not in skipped]
    return backend.decoder.decode(_with_replacements([token for token in tokens if token is not None]))


def special_ids(hf: Any) -> frozenset[int]:
    """Ids of the special tokens of a tokenizer of the tokenizers library, which leaves them out before it joins the
    others; none for any other."""
    backend = getattr(hf, "backend_tokenizer", None)
    added = {} if backend is None else backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)


class TokenBytes:
    """The bytes that single tokens stand for, which need not be whole characters.

    Args:
      hf: the transformers tokenizer.
    """

    def __init__(self, hf: Any) -> None:
        self._hf, self._added, self._types = hf, hf.added_tokens_decoder, decoder_types(hf)

    def __call__(self, token: int) -> bytes:
        """Those of a token; none for an id that isn't used."""
        name = self._hf.convert_ids_to_tokens(token) or ""
        if token in self._added:
            return name.encode()
        if "ByteLevel" in self._types:
            return b"".join(_byte_of_letter().get(each, each.encode()) for each in name)
        found = _BYTE.fullmatch(name) if "ByteFallback" in self._types or not self._types else None
        return bytes([int(found[1], 16)]) if found else name.replace("▁", " ").encode()


@functools.cache
def _byte_of_letter() -> dict[str, bytes]:
    """The letters by which byte-level tokenizers write bytes: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in printable]
    letters = [chr(each) for each in printable] + [chr(256 + i) for i in range(len(others))]
    return dict(zip(letters, (bytes([each]) for each in [*printable, *others]), strict=True))


def falls_back_to_bytes(hf: Any) -> bool:
    """Whether a tokenizer joins byte tokens such as <0xE0> into characters."""
    return "ByteFallback" in decoder_types(hf)


def is_bpe(hf: Any) -> bool:
    """Whether a tokenizer of the tokenizers library makes its tokens by byte-pair encoding."""
    return type(getattr(getattr(hf, "backend_tokenizer", None), "model", None)).__name__ == "BPE"


def decoder_types(hf: Any) -> set[str]:
    """The steps by which a tokenizer of the tokenizers library turns tokens into text; empty for any other."""
    decoder = getattr(getattr(hf, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {each["type"] for each in state.get("decoders", [state])}


def _with_replacements(tokens: Sequence[str]) -> list[str]:
    """The tokens with U+FFFD for each byte token that isn't part of a character."""
    made: list[str] = []
    for is_bytes, group in groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None):
        run = list(group)
        if is_bytes:
            parts = _belongs_to_character(bytes(int(token[3:5], 16) for token in run))
            run = [token if part else _REPLACEMENT for token, part in zip(run, parts, strict=True)]
        made += run
    return made


def _belongs_to_character(data: bytes) -> Iterator[bool]:
    """Whether each byte is part of a UTF-8 character."""
    start = 0
    while start < len(data):
        size = next((n for n in range(1, 5) if _is_character(data[start : start + n])), 0)
        yield from [size > 0] * max(size, 1)
        start += max(size, 1)


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False
