"""Checks of what lm-evaluation-harness hands over, and of whether it is installed."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax

from polarjax.errors import InputError, not_finite
from polarjax.numeric import plain, shown, whole_number
from polarjax.text.assembly import Completion

INSTALL = "pip install 'polarjax[eval]'"


def lm_eval_module(name: str) -> ModuleType:
    """A module of lm-eval; raises `InputError` with the line to run if it isn't installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            "lm-evaluation-harness needs the package lm-eval, 0.4.13 or newer",
            where="polarjax.evaluation.harness",
            got="no such package" if error.name == "lm_eval" else str(error),
            hint=INSTALL,
        ) from error


def batch_rows(batch_size: Any) -> int | None:
    """The batch size as a number, None for "auto"; also from text, as lm-eval's command passes it."""
    if isinstance(batch_size, str):
        if batch_size.partition(":")[0] == "auto":
            return None
        batch_size = int(batch_size) if batch_size.isdecimal() else batch_size
    return whole_number(batch_size, "batch_size", where="HarnessLM")


def check_device(device: Any) -> None:
    """Raises `InputError` if `device` is another platform than the one that JAX uses."""
    if device is None:
        return
    used = {"gpu": ("gpu", "cuda", "rocm")}.get(jax.default_backend(), (jax.default_backend(),))
    if not isinstance(device, str) or device.partition(":")[0] not in used:
        raise InputError(
            "JAX uses another device",
            where="device",
            got=shown(device),
            expected=used[0],
            hint="leave device out, and set the environment variable JAX_PLATFORMS before the start",
        )


def special_token(token: Any, vocab_size: int) -> int | None:
    """The id of a prefix token; raises `InputError` if the model has no such token."""
    token = plain(token)
    if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
        raise InputError(
            "no such token",
            where="prefix_token_id",
            got=shown(token),
            expected=f"0 to {vocab_size - 1}",
            hint="leave it out for the tokenizer's BOS or EOS token",
        )
    return token


def check_texts(continuations: Sequence[str]) -> None:
    """Raises `InputError` if a continuation is empty."""
    empty = next((i for i, each in enumerate(continuations) if not each), None)
    if empty is not None:
        raise InputError(
            "a continuation is empty", where=f"request {empty}", hint="give every choice of the task a text"
        )


def encoded(tokenizer: Any, text: str, special: bool | None) -> list[int]:
    """The text's token ids; `special` None leaves special tokens to the tokenizer. Raises `InputError` for no text."""
    options = {} if special is None else {"add_special_tokens": special}
    try:
        return tokenizer.encode(text, verbose=False, **options)
    except (TypeError, UnicodeError) as error:  # lone surrogates
        raise InputError(
            "not a text", where="harness", got=f"{text!r:.40}", hint="use Unicode texts"
        ) from error


def check_finished(completion: Completion, *, where: str) -> None:
    """Raises `InputError` if the model computed NaN or infinity."""
    if completion.ending == "failed":
        raise not_finite(where)
