"""Prompts in files: a prompt on each line of a text file, or JSON lines with a prompt or the messages of a chat."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polarjax.errors import InputError
from polarjax.text.assembly import Completion
from polarjax.text.corpus import read_text
from polarjax.text.tokenizer import Tokenizer

SHAPES = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
_MOST_NAMED = 10

type Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be continued.

    Attributes:
      name: what an error calls it: its line, or its number.
      text: a text to go on with, or what the user says in a chat.
      messages: of a chat; None for a text.
      entry: the object it came from; what is written in the end is this, completed.
    """

    name: str
    text: str
    messages: tuple[Message, ...] | None
    entry: dict[str, Any]

    @classmethod
    def of(cls, text: str, name: str) -> "Prompt":
        """A text."""
        return cls(name, text, None, {"prompt": text})

    def ids(self, tokenizer: Tokenizer, *, chat: bool = False, system: str | None = None) -> list[int]:
        """Its tokens; `chat`: what a user says, through the chat template, behind what `system` says.

        Raises:
          InputError: there is no chat template or it refuses the messages, or nothing is left to continue.
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
        """A line of JSON: the object it came from with `completions`; half characters stay JSON escapes."""
        made = [
            {"text": each.text, "tokens": len(each.tokens), "ending": each.ending} for each in completions
        ]
        line = json.dumps(self.entry | {"completions": made}, ensure_ascii=False)
        return line.encode("utf-8", "backslashreplace").decode()  # which writes \ud800 as JSON does


def read_prompt_file(path: Path) -> list[Prompt]:
    """The prompts of a file in their order: `.jsonl` holds an object on each line, any other name a text.

    The name may be in capitals and end in `.xz`. Empty lines are passed over.

    Raises:
      InputError: the file cannot be read or is empty, or lines are no prompts; they are named by their numbers.
    """
    lines = [(i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not path.name.lower().removesuffix(".xz").endswith(".jsonl"):
        return [Prompt.of(line.rstrip("\r"), f"{path}, line {i}") for i, line in lines]
    found, bad = [], []
    for i, line in lines:
        try:
            entry = _entry(line)
        except ValueError as error:
            bad.append(f"line {i} ({error})")
            continue
        messages = tuple(entry["messages"]) if "messages" in entry else None
        found.append(Prompt(f"{path}, line {i}", entry.get("prompt", ""), messages, entry))
    if bad:
        rest = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        raise InputError(
            "lines that are no prompts",
            where=path,
            got=", ".join(bad[:_MOST_NAMED]) + rest,
            expected=SHAPES,
            hint="correct these lines; nothing was generated",
        )
    return found


def _entry(line: str) -> dict[str, Any]:
    """The object on a line; raises `ValueError` that says why there is no prompt in it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"not an object: {type(entry).__name__}")
    if ("prompt" in entry) == ("messages" in entry):
        raise ValueError("both prompt and messages" if "prompt" in entry else "neither prompt nor messages")
    if not isinstance(entry.get("prompt", ""), str):
        raise ValueError("prompt is no text")
    messages = entry.get("messages", [{"role": "", "content": ""}])
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("messages is no list of objects with the texts role and content")
    return entry


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
