"""Packs the prompts of several requests into calls of a few fixed shapes and a bounded number of tokens."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from polarjax.engine.requests import Request, RowSettings
from polarjax.engine.slots import STOP_IDS, Reading
from polarjax.generation.batch import bucket_length
from polarjax.generation.sampling import Categorical
from polarjax.generation.token_loop import Rules
from polarjax.model.chunks import Pieces

PIECE = 128
"""Tokens of a piece where several prompts share a call."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """`count` tokens of a request's prompt, from its token `start` on."""

    request: Request
    start: int
    count: int

    @property
    def last(self) -> bool:
        """Whether the prompt ends with it."""
        return self.start + self.count == len(self.request.prompt)


class Packer:
    """Chooses what is read next.

    A prompt alone is one piece, padded to a power of two; several share a call as pieces of `PIECE` tokens, whose number
    is a power of two. So there are few shapes, each with at most `most` tokens.

    Args:
      most: most tokens of a call.
      slots, capacity: B and S.
      best: of the slots' `Rules`.
    """

    def __init__(self, most: int, *, slots: int, capacity: int, best: int | None) -> None:
        self._most, self._slots, self._capacity, self._best = most, slots, capacity, best
        self._longest = min(most, capacity)
        self._piece = min(PIECE, self._longest)

    @property
    def shapes(self) -> Iterator[tuple[int, int]]:
        """All shapes (R, T) of calls."""
        yield from dict.fromkeys((1, bucket_length(n, self._longest)) for n in range(1, self._longest + 1))
        yield from ((1 << i, self._piece) for i in range(1, self._largest.bit_length()))

    def pack(self, requests: Sequence[Request]) -> tuple[list[Piece], Reading]:
        """The next pieces of `requests`, the first ones first, and the call that reads them."""
        first = requests[0]
        if len(requests) == 1 or first.unread >= self._longest or self._largest == 1:
            pieces = [Piece(first, first.read, min(first.unread, self._longest))]
            shape = 1, bucket_length(pieces[0].count, self._longest)
        else:
            pieces = [each for request in requests for each in self._cut(request)]
            pieces = pieces[: self._largest]
            shape = 1 << (len(pieces) - 1).bit_length(), self._piece
        return pieces, self.reading(pieces, shape)

    @property
    def _largest(self) -> int:
        """Most pieces in a call, a power of two: as many as `most` tokens are, but no more than all slots can need."""
        needed = self._slots * -(-self._capacity // self._piece)
        return min(1 << ((self._most // self._piece).bit_length() - 1), 1 << (needed - 1).bit_length())

    def _cut(self, request: Request) -> Iterator[Piece]:
        for start in range(request.read, len(request.prompt), self._piece):
            yield Piece(request, start, min(self._piece, len(request.prompt) - start))

    def reading(self, pieces: Sequence[Piece], shape: tuple[int, int]) -> Reading:
        """The pieces as arrays on the device; room that they leave reads nothing."""
        tokens: Any = np.zeros(shape, np.int32)
        for row, each in zip(tokens, pieces, strict=False):
            row[: each.count] = each.request.prompt[each.start : each.start + each.count]
        rest = [Piece(_NOBODY, 0, 0)] * (shape[0] - len(pieces))
        every = [*pieces, *rest]
        counts, start = (
            _column(np.int32, (p.count for p in every)),
            _column(np.int32, (p.start for p in every)),
        )
        rows = _column(np.int32, (self._slots if p.request is _NOBODY else p.request.slot for p in every))
        last = _column(bool, (p.last and p.count > 0 for p in every))
        settings = [p.request.settings for p in every]
        wide = np.int64 if jax.config.jax_enable_x64 else np.int32  # pyright: ignore[reportAttributeAccessIssue]
        seeds = _column(np.int64, (each.seed for each in settings)).astype(wide)
        made = Reading(Pieces(tokens, counts, rows, start), last, seeds, self._rules(settings))
        return jax.device_put(made)

    def _rules(self, settings: Sequence[RowSettings]) -> Rules:
        sampler = zip(*(each.sampler for each in settings), strict=True)
        kinds = np.float32, np.int32, np.float32
        return Rules(
            Categorical.of_rows(*(np.array(each, kind) for each, kind in zip(sampler, kinds, strict=True))),
            _column(np.int32, ((*s.stop_ids, *[-1] * (STOP_IDS - len(s.stop_ids))) for s in settings)),
            _column(np.int32, (each.limit for each in settings)),
            None,
            _column(np.float32, (each.repetition_penalty for each in settings)),
            _column(bool, (each.logprobs is not None for each in settings)),
            self._best,
        )


_NOBODY = Request(-1, np.zeros(0, np.int32), RowSettings((0.0, 1, 1.0), (), 0, 0, 1.0, None), None)


def _column(kind: type, values: Iterable[Any]) -> Any:
    return np.array(list(values), kind)
