"""Token windows: texts as one stream of tokens, cut into rows of equal length."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from polarjax.errors import InputError
from polarjax.numeric import spread
from polarjax.text.corpus import DOCUMENT_SEPARATOR
from polarjax.text.token_bytes import encode_with_bytes, words_of
from polarjax.text.tokenizer import Tokenizer
from polarjax.types import Bool, Int


@dataclasses.dataclass(frozen=True)
class ScoredWindows:
    """Windows of a text, and which of their tokens are scored.

    Attributes:
      tokens: int32 [n T].
      scored: bool [n T]; False for tokens that aren't text, such as BOS before a document, and for those that an
        earlier window scores, if windows overlap.
      num_bytes: UTF-8 bytes of the text that each token stands for, int32 [n T]; 0 where not scored.
      num_words: words that begin in each token, int32 [n T]; 0 where not scored.
      stride: tokens of the text from one window's start to the next.
      bos: the id that every window begins with; None if the tokenizer has none.
    """

    tokens: Int[np.ndarray, "n T"]
    scored: Bool[np.ndarray, "n T"]
    num_bytes: Int[np.ndarray, "n T"]
    num_words: Int[np.ndarray, "n T"]
    stride: int
    bos: int | None

    def scored_bytes(self, context: int) -> int:
        """Bytes of the tokens that are scored when the first `context` of each window, at least one, are given."""
        return int(self.num_bytes[:, max(context, 1) :].sum(dtype=np.int64))


def token_stream(text: str, encode: Callable[[str], Sequence[int]], *, separator: int | None) -> np.ndarray:
    """All documents of `text` as one int32 stream; `separator` (the BOS id; None = nothing) precedes each.

    `encode` turns a document into token ids without adding special tokens.
    """
    return _joined([np.asarray(encode(document), np.int32) for document in _documents(text)], separator)


def windows(
    tokens: Sequence[int] | np.ndarray,
    length: int,
    *,
    first: int | None = None,
    at_least: int = 1,
    source: str = "the text",
) -> np.ndarray:
    """Consecutive, non-overlapping windows [n length] int32 of a token stream; the short tail is dropped.

    With `first` (a BOS id) each window is that token followed by length - 1 tokens of the stream.
    Raises InputError if there are fewer than `at_least` windows; it names `source` and the tokens got and needed.
    """
    stream = np.asarray(tokens, np.int32)
    taken = length if first is None else length - 1
    at = _cut(np.zeros(len(stream), bool), taken, taken, at_least=at_least, length=length, source=source)
    return _begun(stream[at], first)


def text_windows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, *, most: int | None = None, source: str
) -> Int[np.ndarray, "n T"]:
    """Windows of `length` tokens of all `texts` to learn from, starting with BOS if the tokenizer has one.

    If the tokenizer has one but doesn't begin texts with it, prompts come both ways (a chat begins with it), so every
    second window starts without. BOS also precedes each document, but a window never starts with two.

    Args:
      texts: documents, or several separated by form feeds.
      tokenizer: the model's tokenizer.
      length: T, BOS included.
      most: maximum number of windows, evenly spread over the text; None takes all.
      source: name of the texts in an error.

    Raises:
      InputError: the text does not fill one window, or `length` or `most` is too small.
    """
    _check_most(most, source)
    bos, documents = tokenizer.bos_id, _documents(DOCUMENT_SEPARATOR.join(texts))
    rows = [np.asarray(ids, np.int32) for ids in tokenizer.ids_of(documents)]
    stream, is_text = _joined(rows, bos), _is_text(rows, bos)
    taken = length - (bos is not None)
    at = _cut(~is_text, taken, taken, at_least=1, length=length, source=source)
    at = at[spread(len(at), most)]
    tokens = _begun(stream[at], bos)
    if tokenizer.bos_is_optional:
        plain = np.flatnonzero((np.arange(len(at)) % 2 == 1) & (at[:, -1] + 1 < len(stream)))
        tokens[plain] = stream[at[plain, :1] + np.arange(length)]
    return tokens


def scored_windows(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    *,
    stride: int | None = None,
    most: int | None = None,
    source: str,
) -> ScoredWindows:
    """The windows of `text_windows`, which tokens of them a score counts, their bytes and words.

    Args:
      texts, tokenizer, length, most, source: as in `text_windows`; here every window starts with BOS if there is one.
      stride: tokens from one window's start to the next; None means that windows don't overlap. With a smaller
        stride, a window begins with text that the one before it scores, and scores only what is new.

    Raises:
      InputError: as in `text_windows`, or the stride is below 1 or leaves out text.
    """
    _check_most(most, source)
    bos = tokenizer.bos_id
    taken = length - (bos is not None)
    stride = _checked_stride(stride, taken)
    if_bos = lambda value: None if bos is None else value
    documents = _documents(DOCUMENT_SEPARATOR.join(texts))
    encoded = [encode_with_bytes(tokenizer.hf, document) for document in documents]
    words = [words_of(document, sizes) for document, (_, sizes) in zip(documents, encoded, strict=True)]
    stream = _joined([ids for ids, _ in encoded], bos)
    is_text = _is_text([ids for ids, _ in encoded], bos)
    at = _cut(~is_text, taken, stride, at_least=1, length=length, source=source)
    is_new = at > np.append(-1, at[:-1, -1])[:, None]
    chosen = spread(len(at), most)
    at, is_new = at[chosen], is_new[chosen]
    begun = lambda values: _begun(np.where(is_new, values[at], 0), if_bos(0)).astype(values.dtype)
    return ScoredWindows(
        tokens=_begun(stream[at], bos),
        scored=begun(is_text),
        num_bytes=begun(_joined([sizes for _, sizes in encoded], if_bos(0))),
        num_words=begun(_joined(words, if_bos(0))),
        stride=stride,
        bos=bos,
    )


def _check_most(most: int | None, source: str) -> None:
    """Raises `InputError` unless `most` allows a window."""
    if most is not None and most < 1:
        hint = "allow more tokens (--max-tokens), or use shorter windows (--window)"
        raise InputError("no window is left", where=source, got=most, expected="at least 1 window", hint=hint)


def _checked_stride(stride: int | None, taken: int) -> int:
    """The stride, by default `taken`, which is all of a window's text."""
    if stride is None:
        return taken
    if not 1 <= stride <= taken:
        expected = f"1 to {taken}, the tokens of text in a window"
        hint = "lower the stride, or lengthen the windows" if stride > taken else "raise the stride"
        raise InputError(
            "not a stride between windows", where="stride", got=stride, expected=expected, hint=hint
        )
    return stride


def _documents(text: str) -> list[str]:
    return list(filter(str.strip, text.split(DOCUMENT_SEPARATOR)))


def _joined(parts: Sequence[np.ndarray], first: int | None) -> np.ndarray:
    """All parts, each with `first` before it unless that is None, int32."""
    head = [] if first is None else [first]
    return np.concatenate(
        [np.zeros(0, np.int32), *(np.append(head, part).astype(np.int32) for part in parts)]
    )


def _is_text(parts: Sequence[np.ndarray], first: int | None) -> Bool[np.ndarray, "tokens"]:
    """Which tokens of `_joined(parts, first)` are the parts'."""
    return _joined([np.ones(len(part)) for part in parts], None if first is None else 0) > 0


def _begun(rows: np.ndarray, first: int | None) -> np.ndarray:
    if first is None:
        return rows
    return np.insert(rows, 0, first, axis=1)


def _cut(
    is_separator: np.ndarray, taken: int, stride: int, *, at_least: int, length: int, source: str
) -> Int[np.ndarray, "n taken"]:
    """Positions in a stream of windows of `taken` tokens, one every `stride`; none begins with a separator."""
    if taken < 1:
        at_least = length - taken + 1
        raise InputError(
            "the window is too short",
            where=source,
            got=f"{length} tokens",
            expected=f"at least {at_least}",
            hint="use longer windows (--window)",
        )
    count, starts, start, skipped = len(is_separator), [], 0, 0
    while start < count:
        if is_separator[start]:
            skipped += 1
            start += 1
        else:
            starts.append(start)
            start += stride
    starts = [start for start in starts if start + taken <= count]
    if len(starts) < at_least:
        raise InputError(
            "the text is too short",
            where=source,
            got=f"{count - skipped} tokens",
            expected=f"at least {at_least * taken} tokens ({at_least} windows of {taken})",
            hint="give a longer text or a smaller window",
        )
    return np.reshape(np.asarray(starts, np.int64), (-1, 1)) + np.arange(taken)
