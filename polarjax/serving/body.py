"""The body of a request: every field is used, ignored because it has no effect here, or refused by name."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polarjax.engine.slots import MOST_LOGPROBS
from polarjax.errors import InputError, PolarjaxError
from polarjax.generation.checks import check_best, check_new_tokens, check_seed, check_stop_ids
from polarjax.generation.settings import GenerationSettings
from polarjax.numeric import shown
from polarjax.serving.errors import ApiError, checked
from polarjax.serving.messages import conversation
from polarjax.storage.strict_json import strict_json
from polarjax.text.assembly import check_stop_strings

MOST_STOPS, LONGEST_STOP = 16, 256  # every new token is compared with them, for all requests in one thread

type Kind = tuple[Callable[[Any], bool], str]
"""A test of a value's type, and what is expected."""


def _list_of(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(each, value))


def _whole(value: Any) -> bool:
    return type(value) is int


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _prompts(value: Any) -> bool:
    """One text or list of ids, or a list of either kind."""
    ids = _list_of(_whole)
    return value != [] and any(test(value) for test in (_text, _list_of(_text), ids, _list_of(ids)))


TEXT: Kind = _text, "a text"
WHOLE: Kind = _whole, "a whole number"
NUMBER: Kind = (lambda value: type(value) in (int, float)), "a number"
FLAG: Kind = (lambda value: isinstance(value, bool)), "true or false"
IDS: Kind = _list_of(_whole), "a list of token ids"
TEXTS: Kind = (lambda value: _text(value) or _list_of(_text)(value)), "a text, or a list of texts"
MESSAGES: Kind = (lambda value: isinstance(value, list) and bool(value)), "a list of messages, at least one"
OPTIONS: Kind = (
    lambda value: isinstance(value, dict) and all(isinstance(each, bool | None) for each in value.values()),
    "an object of true and false",
)

COMMON: dict[str, Kind] = {
    "model": TEXT,
    "n": WHOLE,
    "max_tokens": WHOLE,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": WHOLE,
    "repetition_penalty": NUMBER,
    "seed": WHOLE,
    "stop": TEXTS,
    "stop_token_ids": IDS,
    "ignore_eos": FLAG,
    "stream": FLAG,
    "stream_options": OPTIONS,
}
COMPLETIONS: dict[str, Kind] = COMMON | {
    "prompt": (_prompts, "a text, token ids, or a list of either kind, at least one"),
    "echo": FLAG,
    "logprobs": WHOLE,
}
CHAT: dict[str, Kind] = COMMON | {
    "messages": MESSAGES,
    "max_completion_tokens": WHOLE,
    "logprobs": FLAG,
    "top_logprobs": WHOLE,
}
"""The fields of the two kinds of requests. null is the same as leaving a field out."""

WITHOUT_EFFECT: dict[str, Sequence[Any]] = {
    "suffix": ("",),
    "best_of": (1,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that aren't supported, and the values that change nothing."""

IGNORED = frozenset(
    (
        "user metadata store safety_identifier prompt_cache_key prompt_cache_retention service_tier "
        "parallel_tool_calls"
    ).split()
)
"""Fields that can't change the tokens."""

USAGE = "include_usage"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a body asks for.

    Attributes:
      chat: whether it is a conversation.
      prompts: texts, lists of token ids, or one conversation.
      n: sequences for each prompt.
      max_tokens: None if the body doesn't say.
      seed: None if the body doesn't say.
      logprobs: how many of the likeliest tokens have theirs reported; None for no log-probabilities.
      settings: the other arguments of `Engine.submit`.
      echo: whether texts begin with their prompts.
      stream, usage: whether to answer in events, and to end them with the number of tokens.
    """

    chat: bool
    prompts: Sequence[Any]
    n: int
    max_tokens: int | None
    seed: int | None
    logprobs: int | None
    settings: Mapping[str, Any]
    echo: bool
    stream: bool
    usage: bool


def read_json(raw: bytes) -> dict[str, Any]:
    """The object in a body; raises `ApiError` unless it is one, without NaN and infinity and without repeated keys."""
    try:
        data = strict_json(raw, hint="correct the body")
    except InputError as error:
        refused = PolarjaxError(
            error.what, where="the JSON of the body", got=error.got, expected=error.expected
        )
        raise ApiError(str(refused)) from error
    if not isinstance(data, dict):
        raise ApiError(f"the body is not a JSON object; got {shown(data)}")
    return {name: value for name, value in data.items() if value is not None}


def parse(data: Mapping[str, Any], own: GenerationSettings, *, chat: bool, model: str) -> Asked:
    """What a body without nulls asks for; `own` are the model's settings, and `model` is its name.

    Raises:
      ApiError: a field is missing, unknown, of the wrong type or out of its range.
    """
    _check_fields(data, CHAT if chat else COMPLETIONS, "messages" if chat else "prompt")
    if data.get("model", model) != model:
        found = shown(data["model"])
        raise ApiError(
            f"there is no model {found}; this server has {model}",
            status=404,
            param="model",
            code="model_not_found",
        )
    stream, options = data.get("stream", False), data.get("stream_options", {})
    if "stream_options" in data and not stream:
        raise ApiError("stream_options needs stream: true", param="stream_options")
    if unknown := options.keys() - {USAGE, "include_obfuscation"}:
        raise ApiError(f"unsupported stream_options: {min(unknown)}", param="stream_options")
    prompts = [conversation(data["messages"])] if chat else _listed(data["prompt"])
    logprobs, echo = _logprobs(data, chat), data.get("echo", False)
    if echo and logprobs is not None:
        raise ApiError("echo with logprobs isn't supported: prompts have no log-probabilities", param="echo")
    n = data.get("n", 1)
    if n < 1:
        raise ApiError(f"n: no sequences; got {n}, expected at least 1", param="n")
    return Asked(
        chat=chat,
        prompts=prompts,
        n=n,
        max_tokens=_max_tokens(data),
        seed=checked("seed", check_seed, data["seed"]) if "seed" in data else None,
        logprobs=logprobs,
        settings=_sampling(data, own) | _stops(data, own),
        echo=echo,
        stream=stream,
        usage=bool(options.get(USAGE)),
    )


def _check_fields(data: Mapping[str, Any], fields: Mapping[str, Kind], needed: str) -> None:
    for name, value in data.items():
        if name in fields:
            test, expected = fields[name]
            if not test(value):
                raise ApiError(f"{name}: got {shown(value)}, expected {expected}", param=name)
        elif name in WITHOUT_EFFECT:
            usual = WITHOUT_EFFECT[name]
            if isinstance(value, bool) or value not in usual:
                expected = " or ".join(json.dumps(each) for each in usual)
                raise ApiError(
                    f"{name} isn't supported; got {shown(value)}, expected {expected}, or no such field",
                    param=name,
                    code="unsupported_parameter",
                )
        elif name not in IGNORED:
            raise ApiError(f"unsupported field: {shown(name)}", param=name, code="unsupported_parameter")
    if needed not in data:
        raise ApiError(f"{needed} is missing", param=needed)


def _listed(prompt: Any) -> list[Any]:
    """The prompts of a field that holds one or several."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _max_tokens(data: Mapping[str, Any]) -> int | None:
    given = {name: data[name] for name in ("max_tokens", "max_completion_tokens") if name in data}
    if len(set(given.values())) > 1:
        raise ApiError("max_tokens and max_completion_tokens contradict each other", param="max_tokens")
    for name, value in given.items():
        return checked(name, check_new_tokens, value)
    return None


def _logprobs(data: Mapping[str, Any], chat: bool) -> int | None:
    if not chat:
        return checked("logprobs", check_best, data.get("logprobs"), MOST_LOGPROBS)
    best = checked("top_logprobs", check_best, data.get("top_logprobs", 0), MOST_LOGPROBS)
    if "top_logprobs" in data and not data.get("logprobs"):
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    return best if data.get("logprobs") else None


def _sampling(data: Mapping[str, Any], own: GenerationSettings) -> dict[str, Any]:
    """The sampler and penalty: the model's own, overridden by the body; a temperature of 0 draws nothing."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = {name: data[name] for name in names if name in data}
    check = lambda name, value: checked(name, GenerationSettings().with_flags, **{name: value})
    made = checked("temperature", own.asked, given, check)
    return {"sampler": made.sampler, "repetition_penalty": made.repetition_penalty}


def _stops(data: Mapping[str, Any], own: GenerationSettings) -> dict[str, Any]:
    """Stop strings instead of the model's own, and stop ids in addition to them."""
    ids = () if data.get("ignore_eos") else own.stop_ids
    more = checked("stop_token_ids", check_stop_ids, data.get("stop_token_ids", []))
    made: dict[str, Any] = {"stop_ids": (*ids, *more)}
    if "stop" in data:
        stops = [data["stop"]] if isinstance(data["stop"], str) else data["stop"]
        if len(stops) > MOST_STOPS or any(len(each) > LONGEST_STOP for each in stops):
            expected = f"at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters"
            raise ApiError(f"stop: too much to look for; expected {expected}", param="stop")
        made["stop_strings"] = checked("stop", check_stop_strings, stops)
    return made
