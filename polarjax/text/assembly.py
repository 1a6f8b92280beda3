"""Converts tokens to text as they arrive; holds back text that later tokens may change or cut off."""

import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Literal, Self

import numpy as np

from polarjax.errors import InputError
from polarjax.generation.stream import TokenStream
from polarjax.generation.token_loop import Generation
from polarjax.model.readable import fetched
from polarjax.numeric import check_type, items, shown
from polarjax.text.tokenizer import Tokenizer

type Ending = Literal["stop_id", "stop_string", "length", "failed"]

_INCOMPLETE = "\ufffd"  # decoders emit it for invalid or incomplete UTF-8


@dataclasses.dataclass(frozen=True)
class Completion:
    """The text generated after a prompt.

    Attributes:
      text: without the stop string, if one ended it.
      tokens: ids, up to and including the one that ended it.
      ending: why it ended: "stop_id", "stop_string", "length" (`max_new_tokens`), or "failed" (the model computed NaN or
        infinity).
    """

    text: str
    tokens: tuple[int, ...]
    ending: Ending


class Assembler:
    """Builds the text of one sequence, token by token; the results of `push` and `finish` add up to `text`.

    The text ends before the first completed stop string; if several end there, before the longest.

    Attributes:
      text: the text so far, without a stop string; its end may be held back.
      stopped: whether a stop string was found.
      tokens: ids used, up to the one that completed the stop string.

    Args:
      decode: the text of ids.
      context: the last tokens of the prompt.
      stop_strings: strings that end the text.
      silent: ids that `decode` leaves out, such as special tokens; a run of them isn't decoded again and again.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        context: Sequence[int] = (),
        stop_strings: tuple[str, ...] = (),
        silent: Container[int] = (),
    ) -> None:
        self.text, self.stopped, self.tokens = "", False, []
        self._decode, self._stops, self._silent = decode, stop_strings, silent
        self._window = list(context)  # decoded together: the last complete piece and newer tokens
        self._settled = len(self._window)  # how many of them are older than the newer tokens
        self._prompt = decode(self._window) if self._window else ""  # may end in an incomplete character
        self._seen = len(self._prompt)  # characters of the window that are in `text`, or the prompt's
        self._shown = 0

    @classmethod
    def of(cls, tokenizer: Tokenizer, context: Sequence[int], stop_strings: tuple[str, ...] = ()) -> Self:
        """For text by this tokenizer, after a prompt that ends with the tokens of `context`."""
        silent = getattr(tokenizer, "silent_ids", ())
        return cls(tokenizer.decode_ids, context=context, stop_strings=stop_strings, silent=silent)

    def push(self, ids: Sequence[int]) -> str:
        """Adds tokens; returns the text that can be shown now."""
        for each in [[token] for token in ids] if self._stops else [list(ids)]:
            if not self.stopped and each:
                self.tokens += each
                self._take(each)
        return self._show(len(self.text) - (0 if self.stopped else self._held()))

    def finish(self) -> str:
        """Ends the sequence; returns the text that was held back."""
        if not self.stopped:
            text = self._decode(self._window)
            self._accept(text, len(text))
        return self._show(len(self.text))

    def _take(self, ids: list[int]) -> None:
        heard = [each for each in ids if each not in self._silent]
        if not heard:
            return
        self._window += heard
        text = self._decode(self._window)
        whole = text.rstrip(_INCOMPLETE)
        self._accept(text, len(whole))
        tail = self._window[self._settled :]
        if whole != text:
            return
        if length := len(self._decode(tail)):  # a tail without text would read differently at the start
            self._window, self._seen, self._prompt = tail, length, ""
            self._settled = len(tail)

    def _accept(self, decoded: str, end: int) -> None:
        """Adds the window's new text up to `end`, including a character that began in the prompt."""
        if self._prompt and not self.text:
            self._seen = _shared(self._prompt, decoded)
        new, self._seen = decoded[self._seen : end], max(self._seen, end)
        before, self.text = len(self.text), self.text + new
        found = [(self.text.find(stop, max(0, before - len(stop) + 1)), len(stop)) for stop in self._stops]
        ends = [(start + length, start) for start, length in found if start >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)[1]], True

    def _held(self) -> int:
        """Length of the longest suffix of the text that starts a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self.text))
        begins = lambda end: any(stop.startswith(end) for stop in self._stops)
        return next((n for n in range(longest, 0, -1) if begins(self.text[-n:])), 0)

    def _show(self, end: int) -> str:
        shown, self._shown = self._shown, max(self._shown, end)
        return self.text[shown : self._shown]


class TextStream(Iterator[tuple[str, ...]]):
    """Yields the new text of each row of a `TokenStream`, possibly ""; halts rows at stop strings.

    Raises:
      InputError: a stop string is empty.
    """

    def __init__(
        self, tokens: TokenStream, tokenizer: Tokenizer, *, stop_strings: Sequence[str] = ()
    ) -> None:
        check_type(tokens, TokenStream, where="TextStream", hint="pass what pj.stream returned")
        if not callable(getattr(tokenizer, "decode_ids", None)):
            got, hint = type(tokenizer).__name__, "pass bundle.tokenizer"
            raise InputError("not a tokenizer", where="TextStream", got=got, hint=hint)
        self._tokens = tokens
        self._rows = [
            Assembler.of(tokenizer, context, check_stop_strings(stop_strings)) for context in tokens.context
        ]
        self._endings: list[Ending | None] = [None] * len(self._rows)

    @property
    def completions(self) -> tuple[Completion, ...]:
        """Every row so far; complete once the stream has ended."""
        return tuple(
            Completion(row.text, tuple(row.tokens), ending or "length")
            for row, ending in zip(self._rows, self._endings, strict=True)
        )

    def __next__(self) -> tuple[str, ...]:
        """The next text of all rows; waits for the device."""
        piece = next(self._tokens)
        shown = tuple(self._push(i, piece) for i in range(len(self._rows)))
        if not self._tokens.finished:
            self._tokens.halt(np.array([ending is not None for ending in self._endings]))
        return shown

    def _push(self, i: int, piece: Generation) -> str:
        row = self._rows[i]
        if self._endings[i] is not None:
            return ""
        shown = row.push(np.asarray(piece.tokens)[i, : int(piece.lengths[i])].tolist())
        ending = _ending(row, bool(piece.stopped[i]), bool(piece.failed[i]))
        if ending is None and not self._tokens.finished:
            return shown
        shown += row.finish()
        self._endings[i] = "stop_string" if row.stopped else ending or "length"
        return shown


def complete(
    made: Generation, tokenizer: Tokenizer, context: Sequence[Sequence[int]], stop_strings: Sequence[str] = ()
) -> tuple[Completion, ...]:
    """The texts of a whole generation, cut at stop strings.

    Args:
      made: a generation of B rows.
      tokenizer: the model's tokenizer.
      context: the last tokens of each row's prompt.
      stop_strings: strings that end a row.

    Raises:
      InputError: a stop string is empty.
    """
    done, stop_strings = [], check_stop_strings(stop_strings)
    rows = zip(context, *fetched((made.tokens, made.lengths, made.stopped, made.failed)), strict=True)
    for before, tokens, length, stopped, failed in rows:
        row = Assembler.of(tokenizer, before, stop_strings)
        row.push(tokens[:length].tolist())
        row.finish()
        ending = _ending(row, stopped, failed) or "length"
        done.append(Completion(row.text, tuple(row.tokens), ending))
    return tuple(done)


def check_stop_strings(strings: Sequence[str]) -> tuple[str, ...]:
    """The strings, none of them empty; raises `InputError` otherwise."""
    found = items(strings)
    if found is None or not all(isinstance(each, str) and each for each in found):
        raise InputError(
            "unusable stop strings",
            where="stop_strings",
            got=shown(strings),
            expected="a list or tuple of texts",
            hint='pass texts of at least one character, for example "\\n\\n"',
        )
    return found


def _shared(left: str, right: str) -> int:
    """Length of the longest common prefix."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _ending(row: Assembler, stopped: bool, failed: bool) -> Ending | None:
    if row.stopped:
        return "stop_string"
    return "stop_id" if stopped else "failed" if failed else None
