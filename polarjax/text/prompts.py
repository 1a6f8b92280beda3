"""Prompts from programs and files: texts, and conversations as lists of messages."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polarjax.errors import InputError
from polarjax.text.assembly import Completion
from polarjax.text.corpus import read_text
from polarjax.text.tokenizer import Tokenizer

SHAPES = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
_MOST_NAMED = 10

type Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text or conversation to continue.

    Attributes:
      name: its name in an error: its line or number.
      text: the text to continue, or the user message of a chat.
      messages: the messages of a chat; None for a text.
      entry: the object it came from; the output is this plus the completions.
    """

    name: str
    text: str
    messages: tuple[Message, ...] | None
    entry: dict[str, Any]

    @classmethod
    def of(cls, text: str, name: str) -> "Prompt":
        """A prompt from a text."""
        return cls(name, text, None, {"prompt": text})

    def ids(self, tokenizer: Tokenizer, *, chat: bool = False, system: str | None = None) -> list[int]:
        """Its tokens. With `chat`, the text is a user message, after the `system` message if there is one.

        Raises:
          InputError: there is no chat template, it refuses the messages, or the prompt has no tokens.
        """
        try:
            if self.messages is None and not chat:
                tokens, _ = tokenizer.encode([self.text])
                return tokens[0].tolist()
            messages = self.messages or ({"role": "user", "content": self.text},)
            before = [] if system is None else [{"role": "system", "content": system}]
            return tokenizer.encode_chat([*before, *messages])
        except InputError as error:
            where = self.name if error.where is None else f"{self.name}: {error.where}"
            raise InputError(
                error.what, where=where, got=error.got, expected=error.expected, hint=error.hint
            ) from error

    def completed(self, completions: Sequence[Completion]) -> str:
        """A line of JSON: its object plus `completions`; lone surrogates stay JSON escapes."""
        made = [
            {"text": each.text, "tokens": len(each.tokens), "ending": each.ending} for each in completions
        ]
        line = json.dumps(self.entry | {"completions": made}, ensure_ascii=False)
        return line.encode("utf-8", "backslashreplace").decode()  # which writes \ud800 as JSON does


def as_prompts(given: Any) -> list[Prompt]:
    """Prompts from a program: texts, or conversations, which are lists of messages with `role` and `content`.

    Args:
      given: a sequence of prompts, or one prompt alone.

    Raises:
      InputError: there is no prompt, or a value is not a prompt; the message gives its number.
    """
    hint = "pass texts, or lists of messages with the texts role and content"
    alone = isinstance(given, str) or _is_conversation(given)
    if not alone and (not isinstance(given, Iterable) or isinstance(given, Mapping | bytes)):
        raise InputError("not prompts", where="prompts", got=type(given).__name__, hint=hint)
    made = []
    for i, each in enumerate([given] if alone else given, 1):
        name = f"prompt {i}"
        if not isinstance(each, str | list | tuple):
            raise InputError("not a prompt", where=name, got=type(each).__name__, hint=hint)
        try:
            made.append(_prompt(_as_entry(each), name))
        except ValueError as error:
            raise InputError(str(error), where=name, hint=hint) from error
    if not made:
        raise InputError("no prompt", where="prompts", got=repr(given), hint=hint)
    return made


def read_prompt_file(path: Path) -> list[Prompt]:
    """Reads the prompts of a file, in order; the file's name gives the format.

    `.jsonl` holds an object on each line; `.json` one array of texts, objects and conversations; any other name a
    text with a prompt on each line. The name may be in capitals and end in `.xz`. A pipe, whose name says nothing,
    holds objects if its first line is one. Empty lines are skipped.

    Raises:
      InputError: the file cannot be read or is empty, or lines are not prompts; the message lists them.
    """
    text, name = read_text(path), path.name.lower().removesuffix(".xz")
    if name.endswith(".json"):
        return _prompts(path, "entry", enumerate(_array(path, text), 1), _as_entry)
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if name.endswith(".jsonl") or (not path.is_file() and _starts_with_object(lines)):
        return _prompts(path, "line", lines, _object)
    return [Prompt.of(line.rstrip("\r"), f"{path}, line {i}") for i, line in lines]


def _prompts(
    path: Path, unit: str, items: Iterable[tuple[int, Any]], read: Callable[[Any], Any]
) -> list[Prompt]:
    """The prompts in numbered items; one error lists all bad items."""
    found, bad = [], []
    for i, item in items:
        try:
            found.append(_prompt(read(item), f"{path}, {unit} {i}"))
        except ValueError as error:
            bad.append(f"{unit} {i} ({error})")
    if bad:
        rest = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        raise InputError(
            "some lines are not prompts" if unit == "line" else "some entries are not prompts",
            where=path,
            got=", ".join(bad[:_MOST_NAMED]) + rest,
            expected=SHAPES,
            hint="correct them; nothing was generated",
        )
    return found


def _array(path: Path, text: str) -> list[Any]:
    """The entries of a `.json` file."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "correct the file; if each line is an object of its own, name it .jsonl"
        raise InputError("not JSON", where=path, got=str(error), hint=hint) from error
    entries = [data] if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        hint = "write an array of prompts, or one on each line of a .jsonl or .txt file"
        got = "an empty array" if entries == [] else type(data).__name__
        raise InputError("no prompts in the file", where=path, got=got, expected="an array", hint=hint)
    return entries


def _starts_with_object(lines: Sequence[tuple[int, str]]) -> bool:
    try:
        return isinstance(json.loads(lines[0][1]), dict)
    except (ValueError, RecursionError):
        return False


def _object(line: str) -> Any:
    """The value in a line of JSON; raises `ValueError` with the reason if it can't be read."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error


def _as_entry(value: Any) -> Any:
    """A text or conversation as the object of a prompt-file line."""
    if isinstance(value, str):
        return {"prompt": str(value)}
    return {"messages": list(value)} if isinstance(value, list | tuple) else value


def _prompt(entry: Any, name: str) -> Prompt:
    """The prompt in an object; raises `ValueError` with the reason if there is none."""
    if not isinstance(entry, dict):
        raise ValueError(f"not an object: {type(entry).__name__}")
    if ("prompt" in entry) == ("messages" in entry):
        raise ValueError("both prompt and messages" if "prompt" in entry else "neither prompt nor messages")
    if not isinstance(entry.get("prompt", ""), str):
        raise ValueError("prompt is not a text")
    if "prompt" in entry:
        return Prompt(name, entry["prompt"], None, entry)
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("messages is not a list of objects with the texts role and content")
    return Prompt(name, "", tuple(messages), entry)


def _is_message(value: Any) -> bool:
    return _is_mapping(value) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_mapping, value))
