"""Packs the prompts of several requests into calls of a few fixed shapes and a bounded number of tokens."""

import dataclasses
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np

from polarjax.engine.requests import Request, RowSettings
from polarjax.engine.slots import STOP_IDS, Reading
from polarjax.generation.sampling import Categorical
from polarjax.generation.token_loop import Rules
from polarjax.model.chunks import Pieces

SHARED = (128, 512)
"""Widths at which several prompts share a call."""

_BEGINNING = (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192)
_LATER = (128, 512, 2048, 8192)
_FLOOR = 256  # tokens that a call takes as long as, at least: it reads all weights


class Shape(NamedTuple):
    """A call's pieces on each data shard, the tokens of each, and whether all of them begin their prompts."""

    rows: int
    width: int
    begin: bool

    @property
    def tokens(self) -> int:
        """Tokens of a shard, padding included."""
        return self.rows * self.width


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

    A prompt is read at once, alone, or together with others of about its length where that is no slower; so its tokens
    attend only to each other. A prompt of more than `most` tokens, or one whose beginning a slot already holds, is read
    alone, in pieces that attend to what was read before. There are few shapes, each with at most `most` tokens.

    On a mesh with the axis `data`, each of its shards reads the prompts of its own slots: as many pieces at a time as
    the others, of the same width.

    Args:
      most: most tokens of a call on each shard.
      slots, capacity: B and S.
      best: of the slots' `Rules`.
      shards: equal parts of the slots, in order.
    """

    def __init__(self, most: int, *, slots: int, capacity: int, best: int | None, shards: int = 1) -> None:
        self.most, self._slots, self._best = most, slots, best
        self._longest = min(most, capacity)
        self.shards, self._each = shards, slots // shards

    def next_slot(self, unused: deque[int]) -> int:
        """Takes the first unused slot out, of the shard that has the most."""
        if self.shards == 1:
            return unused.popleft()
        free = Counter(self._shard(slot) for slot in unused)
        slot = max(unused, key=lambda slot: free[self._shard(slot)])
        unused.remove(slot)
        return slot

    def evenly(self, slots: Iterable[int]) -> int:
        """How many slots are in use if all shards have as many as the one with the most."""
        return self.shards * max(Counter(map(self._shard, slots)).values())

    def _shard(self, slot: int) -> int:
        return slot // self._each

    @property
    def shapes(self) -> Iterator[Shape]:
        """All shapes of calls."""
        for begin in (True, False):
            yield from dict.fromkeys(self._alone(n, begin) for n in range(1, self._longest + 1))
        for narrower, width in pairwise((0, *SHARED)):
            if narrower < self._longest:  # else no prompt needs this one
                yield from (Shape(1 << i, width, True) for i in range(1, self._largest(width).bit_length()))

    def pack(self, requests: Sequence[Request], left: int) -> tuple[list[Piece], Reading] | None:
        """The next pieces of `requests`, the first one first, and the call that reads them; None if it would have more
        than `left` tokens."""
        first = self._shard(requests[0].slot)
        of_shard = lambda shard: [each for each in requests if self._shard(each.slot) == shard]
        group, shape = self._together(of_shard(first))
        if shape.tokens > left:
            return None
        others = (of_shard(shard) for shard in range(self.shards) if shard != first)
        group = [*group, *(each for own in others for each in self._fitting(own, shape))]
        pieces = [Piece(each, each.read, min(each.unread, self._longest)) for each in group]
        return pieces, self.reading(pieces, shape)

    def _alone(self, count: int, begin: bool) -> Shape:
        """The shape for one piece; those that don't begin their prompts are rarer and have fewer shapes."""
        widths = _BEGINNING if begin else _LATER
        fitting = next((width for width in widths if width >= count), self._longest)
        return Shape(1, min(fitting, self._longest), begin)

    def _together(self, requests: Sequence[Request]) -> tuple[Sequence[Request], Shape]:
        """The first request, and others that share its call if that takes no longer than one by one."""
        first = requests[0]
        alone = self._alone(min(first.unread, self._longest), not first.read)
        width = self._shared(first)
        if width is None:
            return [first], alone
        alike = [each for each in requests if (own := self._shared(each)) and own <= width]
        count = min(self._largest(width), 1 << (len(alike).bit_length() - 1))
        alike, shape = alike[:count], Shape(count, width, True)
        apart = sum(max(_FLOOR, self._alone(each.unread, True).width) for each in alike)
        return (alike, shape) if count > 1 and max(_FLOOR, shape.tokens) <= apart else ([first], alone)

    def _fitting(self, requests: Sequence[Request], shape: Shape) -> Sequence[Request]:
        """Requests of a shard that can be read by a call of this shape, which another shard needs."""
        fits = lambda each: min(each.unread, self._longest) <= shape.width and not (shape.begin and each.read)
        return [each for each in requests if fits(each)][: shape.rows]

    def _shared(self, request: Request) -> int | None:
        """The width at which the whole prompt can share a call; None if it can't."""
        fitting = [width for width in SHARED if request.unread <= width and self._largest(width) > 1]
        return fitting[0] if fitting and not request.read else None

    def _largest(self, width: int) -> int:
        """Most prompts of a call of that width, a power of two; 0 if none fits."""
        most = min(self.most // width, self._each)
        return 1 << (most.bit_length() - 1) if most else 0

    def reading(self, pieces: Sequence[Piece], shape: Shape) -> Reading:
        """The pieces as arrays on the device; room that they leave reads nothing."""
        every = [piece for shard in range(self.shards) for piece in self._block(pieces, shard, shape.rows)]
        tokens: Any = np.zeros((len(every), shape.width), np.int32)
        for row, each in zip(tokens, every, strict=True):
            row[: each.count] = each.request.prompt[each.start : each.start + each.count]
        counts, start = (
            _column(np.int32, (p.count for p in every)),
            _column(np.int32, (p.start for p in every)),
        )
        rows = _column(np.int32, (self._slots if p.request is _NOBODY else p.request.slot for p in every))
        last = _column(bool, (p.last and p.count > 0 for p in every))
        settings = [p.request.settings for p in every]
        wide = np.int64 if jax.config.jax_enable_x64 else np.int32
        seeds = _column(np.int64, (each.seed for each in settings)).astype(wide)
        made = Reading(Pieces(tokens, counts, rows, start), last, seeds, self._rules(settings), shape.begin)
        return jax.device_put(made)

    def _block(self, pieces: Sequence[Piece], shard: int, rows: int) -> list[Piece]:
        """The pieces of a shard, and as many that read nothing as there is room for."""
        own = [each for each in pieces if self._shard(each.request.slot) == shard]
        return own + [Piece(_NOBODY, 0, 0)] * (rows - len(own))

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
