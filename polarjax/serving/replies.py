"""Answers in OpenAI's shapes, whole and as chunks of a stream."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from polarjax.engine.requests import Event, Finished
from polarjax.generation.logprobs import LogProbs
from polarjax.generation.stream import CONTEXT
from polarjax.serving.body import Asked
from polarjax.text.assembly import Assembler
from polarjax.text.decoding import TokenBytes
from polarjax.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Instead of minus infinity, which JSON doesn't have."""


def dumps(value: Any) -> bytes:
    """JSON in UTF-8; lone surrogates of a client's text stay escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class Model:
    """What answers say of a model.

    Args:
      name: by which clients call it.
      tokenizer: its tokenizer.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name, self.tokenizer, self.created = name, tokenizer, int(time.time())
        self.token_bytes = TokenBytes(tokenizer.hf)

    @property
    def described(self) -> dict[str, Any]:
        """Its entry in the list of models."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "polarjax"}


class Reply:
    """An answer as it grows.

    Args:
      asked: the request.
      prompts: token ids of each prompt.
      model: what answers.
    """

    def __init__(self, asked: Asked, prompts: Sequence[Any], model: Model) -> None:
        self._asked, self._model, self._created = asked, model.name, int(time.time())
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._prompt_tokens = sum(map(len, prompts))
        rows = [(text, ids) for text, ids in zip(asked.prompts, prompts, strict=True) for _ in range(asked.n)]
        self._choices = [Choice(i, asked, *row, model) for i, row in enumerate(rows)]

    def add(self, index: int, event: Event) -> dict[str, Any] | None:
        """The chunk of an event; None if it has nothing to show yet."""
        made = self._choices[index].add(event)
        return None if made is None else self._object("chunk", [made]) | self._null_usage()

    @property
    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        return self._object("", [each.whole for each in self._choices]) | {"usage": self.usage}

    @property
    def last(self) -> dict[str, Any]:
        """The chunk with the number of tokens, after all others."""
        return self._object("chunk", []) | {"usage": self.usage}

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens; each prompt counts once."""
        made = sum(each.tokens for each in self._choices)
        numbers = (self._prompt_tokens, made, self._prompt_tokens + made)
        return dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), numbers, strict=True))

    def _object(self, part: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "text_completion" if not self._asked.chat else f"chat.completion{part and '.' + part}"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _null_usage(self) -> dict[str, None]:
        return {"usage": None} if self._asked.usage else {}


class Choice:
    """One sequence of an answer.

    Attributes:
      tokens: how many it has so far.
    """

    def __init__(self, index: int, asked: Asked, prompt: Any, ids: Any, model: Model) -> None:
        self.tokens = 0
        self._index, self._chat, self._token_bytes = index, asked.chat, model.token_bytes
        self._began, self._text = False, ""
        self._finished: Finished | None = None
        if asked.echo:
            self._text = prompt if isinstance(prompt, str) else model.tokenizer.decode_ids(ids)
        self._unsent = self._text
        self._logprobs: list[dict[str, Any]] = []
        if asked.logprobs is not None and not asked.chat:
            # where in the text a token begins
            self._places = Assembler.of(model.tokenizer, ids[-CONTEXT:].tolist())

    def add(self, event: Event) -> dict[str, Any] | None:
        """The new part of the sequence; None if there is nothing to show."""
        self.tokens += len(event.tokens)
        self._finished = event.finished
        self._text += event.text
        text, self._unsent = self._unsent + event.text, ""
        logprobs = None
        if event.logprobs is not None and event.tokens:
            logprobs = self._named(event.tokens, event.logprobs)
            self._logprobs.append(logprobs)
        if not (text or logprobs or event.finished):
            return None
        return self._part("delta", text, logprobs)

    @property
    def whole(self) -> dict[str, Any]:
        """The sequence in one piece."""
        self._began = False
        return self._part("message", self._text, _joined(self._logprobs))

    def _part(self, name: str, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        made: dict[str, Any] = {"index": self._index, "logprobs": logprobs, "finish_reason": self._finished}
        if not self._chat:
            return made | {"text": text}
        role = {} if self._began else {"role": "assistant"}
        self._began = True
        return made | {name: role | {"content": text}}

    def _named(self, tokens: Sequence[int], logprobs: LogProbs) -> dict[str, Any]:
        """Log-probabilities in the shape of chats or of completions."""
        chosen = list(zip(tokens, map(_number, logprobs.chosen), strict=True))
        best = [
            list(zip(ids.tolist(), map(_number, values), strict=True))
            for ids, values in zip(logprobs.ids, logprobs.best, strict=True)
        ]
        if self._chat:
            content = [
                self._entry(*mine) | {"top_logprobs": [self._entry(*each) for each in others]}
                for mine, others in zip(chosen, best, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._name(token) for token, _ in chosen],
            "token_logprobs": [value for _, value in chosen],
            "top_logprobs": [self._by_name(others) for others in best],
            "text_offset": [self._place(token) for token in tokens],
        }

    def _by_name(self, best: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by the tokens' names, the largest first; of tokens that read alike, the likeliest counts."""
        made: dict[str, float] = {}
        for token, value in best:
            made.setdefault(self._name(token), value)
        return made

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._token_bytes(token)
        return {"token": self._name(token), "logprob": logprob, "bytes": list(data)}

    def _name(self, token: int) -> str:
        """Its text; of a part of a character, its bytes, as OpenAI writes them."""
        data = self._token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{each:02x}" for each in data)

    def _place(self, token: int) -> int:
        """Where in the text the next token begins."""
        before = len(self._places.text)
        self._places.push([token])
        return before


def _number(value: Any) -> float:
    return max(float(value), LEAST)


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The log-probabilities of all events."""
    if not parts:
        return None
    together = lambda name: (
        None if parts[0][name] is None else [each for part in parts for each in part[name]]
    )
    return {name: together(name) for name in parts[0]}
