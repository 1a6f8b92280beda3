"""Prompts from programs and files: texts, and conversations as lists of messages."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from polarjax.errors import InputError
from polarjax.generation.token_loop import is_token_id
from polarjax.numeric import items
from polarjax.text.assembly import Completion
from polarjax.text.tokenizer import Tokenizer, written

SHAPES = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'

type Message = Mapping[str, str]

_CHEAP = 200_000
"""Characters that are tokenized in a moment."""


def most_characters(tokenizer: Tokenizer, capacity: int) -> int:
    """The longest text that is tokenized for slots of this capacity, even if it turns out to be too long."""
    return max(_CHEAP, capacity * max(map(len, tokenizer.hf.get_vocab())))


def characters(prompt: str | Sequence[Message] | Sequence[int]) -> int:
    """How many a text has, or all messages of a conversation, with their roles and names; token ids have none."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(written(each)) for each in prompt if isinstance(each, Mapping))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text or conversation to continue.

    Attributes:
      name: its name in an error: its line or number.
      text: the text to continue, or the user message of a chat.
      messages: the messages of a chat; None for a text.
      entry: the object it came from; the output is this plus the completions.
      token_ids: a prompt that is given as tokens; None for a text or a chat.
    """

    name: str
    text: str
    messages: tuple[Message, ...] | None
    entry: dict[str, Any]
    token_ids: tuple[int, ...] | None = None

    @classmethod
    def of(cls, text: str, name: str) -> "Prompt":
        """A prompt from a text."""
        return cls(name, text, None, {"prompt": text})

    def ids(self, tokenizer: Tokenizer, *, chat: bool = False, system: str | None = None) -> list[int]:
        """Its tokens. With `chat`, the text is a user message, after the `system` message if there is one.

        Raises:
          InputError: there is no chat template, it refuses the messages, or the prompt has no tokens.
        """
        if self.token_ids is not None:
            return list(self.token_ids)
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
        """A line of JSON: its object plus `completions`."""
        made = [
            {"text": each.text, "tokens": len(each.tokens), "ending": each.ending} for each in completions
        ]
        return as_json(self.entry | {"completions": made})


def as_json(value: Any) -> str:
    """A line of JSON. Lone surrogates and characters that some readers take for ends of lines are escaped."""
    line = json.dumps(value, ensure_ascii=False)
    for each in "\x85\u2028\u2029":
        line = line.replace(each, f"\\u{ord(each):04x}")
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
    prompts = (given,) if alone else items(given)
    if prompts is None:
        raise InputError("not prompts", where="prompts", got=type(given).__name__, hint=hint)
    made = []
    for i, each in enumerate(prompts, 1):
        name = f"prompt {i}"
        if not isinstance(each, str | list | tuple):
            raise InputError("not a prompt", where=name, got=type(each).__name__, hint=hint)
        try:
            made.append(prompt_in(as_entry(each), name))
        except ValueError as error:
            raise InputError(str(error), where=name, hint=hint) from error
    if not made:
        raise InputError("no prompt", where="prompts", got=repr(given), hint=hint)
    return made


def as_entry(value: Any) -> Any:
    """A text or conversation as the object of a prompt-file line."""
    if isinstance(value, str):
        return {"prompt": str(value)}
    return {"messages": list(value)} if isinstance(value, list | tuple) else value


def prompt_in(entry: Any, name: str) -> Prompt:
    """The prompt in an object; raises `ValueError` with the reason if there is none."""
    if not isinstance(entry, dict):
        raise ValueError(f"not an object: {type(entry).__name__}")
    if ("prompt" in entry) == ("messages" in entry):
        raise ValueError("both prompt and messages" if "prompt" in entry else "neither prompt nor messages")
    if "prompt" in entry:
        return _of_text_or_ids(entry, name)
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("messages is not a list of objects with the texts role and content")
    return Prompt(name, "", tuple(messages), entry)


def _of_text_or_ids(entry: dict[str, Any], name: str) -> Prompt:
    given = entry["prompt"]
    if isinstance(given, str):
        return Prompt(name, given, None, entry)
    if not isinstance(given, list) or not given or not all(map(is_token_id, given)):
        raise ValueError("prompt is not a text or a list of token ids")
    return Prompt(name, "", None, entry, tuple(given))


def _is_message(value: Any) -> bool:
    return _is_mapping(value) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_mapping, value))
