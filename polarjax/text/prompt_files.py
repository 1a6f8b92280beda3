"""Prompts read from a file or pipe one by one, so that memory doesn't grow with their number."""

import dataclasses
import hashlib
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from polarjax.errors import InputError
from polarjax.storage.strict_json import strict_json
from polarjax.text.byte_lines import LONGEST_LINE, STDIN, ByteLines
from polarjax.text.corpus import read_text
from polarjax.text.prompts import SHAPES, Prompt, as_entry, as_json, prompt_in

SETTINGS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "stop",
    "stop_ids",
    "seed",
    "logprobs",
)
"""Keys of a line that say how its prompt is continued."""

KEYS = ("id", "prompt", "messages", *SETTINGS)
ANSWERS = ("completions", "error")
"""Keys that the output adds to what it repeats."""

_OBJECT = re.compile(rb'\s*\{\s*["}]')  # how a line of JSON begins, even one that is bad further on
_LOGPROBS = b'"logprobs"'
_BOM, _UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """A prompt with its own settings, or why a line isn't one.

    Attributes:
      name: "line 3", for errors.
      head: what the output repeats; `{"line": 3}` if the line can't be read.
      prompt: the prompt; None if there is an error.
      settings: the line's own, by name.
      error: what is wrong.
      size: bytes of the line, if it is one.
    """

    name: str
    head: Mapping[str, Any]
    prompt: Prompt | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: InputError | None = None
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is in a file that can be read twice: its checksum, the number of prompts, and whether lines may ask for
    log-probabilities."""

    checksum: str
    count: int
    logprobs: bool


class PromptFile:
    """The prompts of a file, in order; the file's name gives the format.

    `.jsonl` holds an object on each line, with a `prompt` (a text or token ids) or `messages`, and optionally an `id`,
    which may be any JSON value, and `SETTINGS`; null is the same as leaving a key out. `.json` holds one array of texts,
    objects and conversations, and is read at once; any other name a text with a prompt on each line. The name may be in
    capitals and end in `.xz`. A pipe, whose name says nothing, and `-`, standard input, hold objects if their first line
    is one. Empty lines are skipped.

    Args:
      path: the file.
      before: texts that come before those of the file.

    Attributes:
      ended: whether all prompts have been taken.
      has_settings: whether lines may have settings.

    Raises:
      InputError: the file can't be read, holds no prompt, is UTF-16, or is a `.json` file without an array.
    """

    def __init__(self, path: Path, before: Sequence[str] = ()) -> None:
        self._path, self._lines, self._number, self._pushed = path, None, 0, None
        self._given = deque(_given(f"prompt {i}", {"prompt": text}) for i, text in enumerate(before, 1))
        name = path.name.lower().removesuffix(".xz")
        self._json = self.has_settings = name.endswith((".json", ".jsonl"))
        if name.endswith(".json"):
            text = read_text(path)
            entries = enumerate(_array(path, text), 1)
            self._given.extend(line_of(f"entry {i}", {"entry": i}, as_entry(each)) for i, each in entries)
            checksum = hashlib.sha256(text.encode()).hexdigest()
            self._whole = Survey(checksum, len(self._given), _LOGPROBS.decode() in text)
            return
        self._lines = ByteLines(path)
        self._pushed = self._next_line(wait=True)
        if self._pushed is None:
            raise InputError("there is no prompt in the file", where=_named(path), hint=_WRITE)
        if self._pushed.startswith(_UTF16):
            self.close()
            raise InputError(
                "the prompts are UTF-16", where=_named(path), expected="UTF-8", hint="save them as UTF-8"
            )
        if not name.endswith(".jsonl") and not self._lines.regular:
            self._json = self.has_settings = _OBJECT.match(self._pushed) is not None

    @property
    def ended(self) -> bool:
        """Whether there is no further prompt."""
        lines = self._lines
        return not self._given and (lines is None or (self._pushed is None and lines.ended))

    def take(self, *, wait: bool = True) -> PromptLine | None:
        """The next prompt; None if there is none, or, unless `wait`, if it hasn't come yet."""
        if self._given:
            return self._given.popleft()
        if self._lines is None:
            return None
        raw, self._pushed = self._pushed, None
        raw = self._next_line(wait=wait) if raw is None else raw
        return None if raw is None else dataclasses.replace(self._parsed(raw), size=len(raw))

    def survey(self) -> Survey | None:
        """What is in the file, before any prompt is taken; None for a pipe, which is read only once."""
        if self._lines is None:
            return self._whole
        if not self._lines.regular:
            return None
        digest, count, logprobs = hashlib.sha256(), len(self._given), False
        for number, line in enumerate(_every(ByteLines(self._path))):
            digest.update(line + b"\n")
            count += bool((line if number else line.removeprefix(_BOM)).strip())
            logprobs = logprobs or _LOGPROBS in line
        return Survey(digest.hexdigest(), count, logprobs and self._json)

    def close(self) -> None:
        """Closes the file; prompts that weren't taken are lost."""
        if self._lines is not None:
            self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_line(self, *, wait: bool) -> bytes | None:
        """The next line that isn't empty."""
        lines = self._lines
        while lines is not None and (line := lines.take(wait=wait)) is not None:
            self._number += 1
            line = line.removeprefix(_BOM) if self._number == 1 else line
            if line.strip():
                return line
        return None

    def _parsed(self, raw: bytes) -> PromptLine:
        name, head = f"line {self._number}", {"line": self._number}
        try:
            if len(raw) > LONGEST_LINE:
                expected = f"at most {LONGEST_LINE:,} bytes"
                raise InputError("the line is too long", expected=expected, hint="shorten the prompt")
            text = _decoded(raw).rstrip("\r")
            if not self._json:
                return _given(name, {"prompt": text})
            return line_of(name, head, strict_json(text, hint=_CORRECT))
        except InputError as error:
            return PromptLine(name, head, error=error)


_WRITE, _CORRECT = "write a prompt on each line", "correct the line"


def line_of(name: str, place: dict[str, Any], entry: Any) -> PromptLine:
    """The prompt and settings in an object, or what is wrong with it.

    Args:
      name: what errors call it.
      place: stands for an object that the output can't repeat.
      entry: the object; null is the same as leaving a key out.
    """
    head = place
    try:
        if not isinstance(entry, dict):
            kind = type(entry).__name__
            raise InputError("not an object", got=kind, expected=SHAPES, hint="write an object on the line")
        head = {key: each for key, each in entry.items() if key not in ANSWERS} or place
        as_json(head)
        given = {key: each for key, each in entry.items() if each is not None}
        for key in given:
            if key not in KEYS:
                expected = ", ".join(KEYS)
                hint = "correct its name; other data can be kept in id, which may be any JSON value"
                raise InputError("unknown key", got=repr(key)[:80], expected=expected, hint=hint)
        return _given(name, given, head)
    except RecursionError:
        too_deep = InputError("not JSON", got="too many brackets inside each other", hint=_CORRECT)
        return PromptLine(name, place, error=too_deep)
    except TypeError as error:  # from a table: bytes, dates, decimals
        not_json = InputError("not JSON", got=str(error), hint="give texts, numbers and lists of these")
        return PromptLine(name, place, error=not_json)
    except InputError as error:
        return PromptLine(name, head, error=error)


def _given(name: str, entry: dict[str, Any], head: Mapping[str, Any] | None = None) -> PromptLine:
    try:
        prompt = prompt_in(entry, name)
    except ValueError as error:
        raise InputError(str(error), expected=SHAPES, hint="correct the line") from error
    settings = {key: value for key, value in entry.items() if key in SETTINGS}
    return PromptLine(name, entry if head is None else head, prompt, settings)


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line"
        raise InputError("not UTF-8", got=got, hint="save the prompts as UTF-8") from error


def _array(path: Path, text: str) -> list[Any]:
    """The entries of a `.json` file."""
    try:
        data = strict_json(text, hint=_CORRECT)
    except InputError as error:
        hint = "correct the file; if each line is an object of its own, name it .jsonl"
        raise InputError(error.what, where=path, got=error.got, hint=hint) from error
    entries = [data] if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        hint = "write an array of prompts, or one on each line of a .jsonl or .txt file"
        got = "an empty array" if entries == [] else type(data).__name__
        raise InputError("no prompts in the file", where=path, got=got, expected="an array", hint=hint)
    return entries


def _every(lines: ByteLines) -> Iterator[bytes]:
    while (line := lines.take(wait=True)) is not None:
        yield line


def _named(path: Path) -> str:
    return "standard input" if path == STDIN else os.fspath(path)
