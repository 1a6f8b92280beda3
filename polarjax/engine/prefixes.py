"""Prompts whose keys and values are still in a slot, for prompts that begin like them."""

from typing import Any

import numpy as np

from polarjax.types import Int32

SHORTEST = 32
"""Fewest tokens that are worth copying."""


class Prefixes:
    """What each of B slots holds from position 0 on."""

    def __init__(self, slots: int) -> None:
        self._held = [np.zeros(0, np.int32)] * slots
        self._starts = [b""] * slots  # of those with `SHORTEST` tokens, the first ones
        self._coming: list[Any] = [None] * slots

    def begin(self, slot: int, prompt: Int32[np.ndarray, "n"]) -> tuple[int, int] | None:
        """The slot is about to be overwritten by this prompt; returns what is found of it before."""
        found = self.find(prompt)
        self._held[slot], self._starts[slot], self._coming[slot] = np.zeros(0, np.int32), b"", prompt
        return found

    def keep(self, slot: int, prompt: Int32[np.ndarray, "n"]) -> None:
        """A token was drawn after this prompt, so that it has no NaN; the slot holds it unless another has begun."""
        if self._coming[slot] is prompt:
            self._held[slot], self._starts[slot], self._coming[slot] = prompt, _start(prompt), None

    def find(self, prompt: Int32[np.ndarray, "n"]) -> tuple[int, int] | None:
        """The slot that holds the longest beginning of the prompt, and its length, which leaves a token to read."""
        prompt = prompt[:-1]
        begins = _start(prompt)
        alike = [i for i, start in enumerate(self._starts) if begins and start == begins]
        if not alike:
            return None
        count, slot = max((_shared(self._held[i], prompt), -i) for i in alike)
        return -slot, count


def _start(prompt: Int32[np.ndarray, "n"]) -> bytes:
    return prompt[:SHORTEST].tobytes() if len(prompt) >= SHORTEST else b""


def _shared(left: Int32[np.ndarray, "n"], right: Int32[np.ndarray, "m"]) -> int:
    """Length of the longest common beginning."""
    n = min(len(left), len(right))
    differs = np.flatnonzero(left[:n] != right[:n])
    return int(differs[0]) if len(differs) else n
