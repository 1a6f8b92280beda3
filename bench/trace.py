"""A fixed trace of requests: prompts of every length, which end at different times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REQUESTS = 1024
SHORTEST, LONGEST = 32, 2048
"""Tokens of a prompt; their logarithm is uniform."""
MEAN_NEW, MOST_NEW = 256, 1024
"""New tokens of a request: geometric with this mean, at most so many."""


@dataclass(frozen=True, eq=False)
class Wish:
    """A request: a prompt, int32 [n], and exactly how many new tokens it gets."""

    prompt: Any
    new: int


def make_trace(vocab_size: int, *, requests: int = REQUESTS, scale: float = 1.0) -> list[Wish]:
    """The first `requests` of the trace: the same lengths for every model, and random ids.

    Args:
      vocab_size: V, of the ids.
      requests: at most `REQUESTS`.
      scale: shortens all lengths, for models with fewer positions and for trying the bench.
    """
    if not 1 <= requests <= REQUESTS:
        raise ValueError(f"trace: not a number of requests; got {requests}; expected 1 to {REQUESTS}")
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), REQUESTS)) * scale
    new = np.minimum(rng.geometric(1 / MEAN_NEW, REQUESTS), MOST_NEW) * scale
    at_least_one = lambda values: np.maximum(1, np.round(values)).astype(int)[:requests]
    return [
        Wish(np.random.default_rng((1, i)).integers(0, vocab_size, length, np.int32), int(count))
        for i, (length, count) in enumerate(zip(at_least_one(lengths), at_least_one(new), strict=True))
    ]


def most(trace: Sequence[Wish]) -> tuple[int, int]:
    """The longest prompt and the most new tokens."""
    return max(len(wish.prompt) for wish in trace), max(wish.new for wish in trace)


def capacity(scale: float = 1.0) -> int:
    """Positions that any request of the whole trace fits into: its prompt and all new tokens but the last."""
    return -(-round((LONGEST + MOST_NEW) * scale) // 8) * 8
