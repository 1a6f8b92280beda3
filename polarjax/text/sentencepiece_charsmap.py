"""The table by which SentencePiece normalizes characters, with exceptions."""

import base64
from collections.abc import Iterable

import numpy as np

_HAS_LEAF = 0x100  # of a unit


class Charsmap:
    """Characters and what they become: a double-array trie, and the texts that its leaves point to.

    Args:
      data: `precompiled_charsmap` of the model; not empty.
      keep: characters that stay what they are.
    """

    def __init__(self, data: bytes, *, keep: Iterable[str]) -> None:
        size = int.from_bytes(data[:4], "little")
        self._units = np.frombuffer(data, "<u4", size // 4, 4).copy()
        self._texts = data[4 + size :]
        for each in keep:
            end = self._end(each)
            if end is not None:
                self._units[end] &= ~np.uint32(_HAS_LEAF)

    def text_of(self, character: str) -> str:
        """What a character becomes by itself."""
        end = self._end(character)
        if end is None:
            return character
        leaf = int(self._units[end ^ _offset(int(self._units[end]))])
        start = leaf & 0x7FFFFFFF
        return self._texts[start : self._texts.index(b"\0", start)].decode()

    def encoded(self) -> str:
        """The table in base64, as tokenizer.json has it."""
        units = self._units.tobytes()
        return base64.b64encode(len(units).to_bytes(4, "little") + units + self._texts).decode()

    def _end(self, character: str) -> int | None:
        """Where the trie has arrived after a character that has a leaf; None if it has none."""
        position, unit = 0, int(self._units[0])
        for byte in character.encode():
            position ^= _offset(unit) ^ byte
            unit = int(self._units[position])
            if unit & 0x800000FF != byte:
                return None
        return position if unit & _HAS_LEAF else None


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
