"""How `generate` draws tokens and ends texts: its options override what the model asks for."""

import dataclasses
from typing import Any

from polarjax.errors import InputError
from polarjax.generation.settings import GENERATION_CONFIG, GenerationSettings
from polarjax.text.assembly import check_stop_strings


def check_options(**options: Any) -> None:
    """Raises `InputError` for a value that no model accepts, naming the option.

    Args:
      options: arguments of `GenerationSettings.with_flags`.
    """
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        hint = "correct the value or omit it; --greedy takes the most likely tokens"
        check_value(name, value, where=option, hint=hint)


def check_value(name: str, value: Any, *, where: str | None, hint: str) -> None:
    """Raises `InputError` for a value of an argument of `GenerationSettings.with_flags` that no model accepts."""
    try:
        GenerationSettings().with_flags(**{name: value})
    except InputError as error:
        raise _reworded(error, where=where, hint=hint) from error


def with_options(settings: GenerationSettings, *, greedy: bool, **options: Any) -> GenerationSettings:
    """The model's settings, overridden by options that `check_options` has checked.

    Raises:
      InputError: an option contradicts `greedy`, or the model's file has an unusable value that would now be used.
    """
    try:
        return settings.with_flags(greedy=greedy, **options)
    except InputError as error:
        if error.where is None:  # greedy and sampling
            raise
        hint = "give an option for it too, or --greedy alone"
        raise _reworded(error, where=f"the model's {GENERATION_CONFIG}", hint=hint) from error


def with_stops(
    settings: GenerationSettings, strings: list[str] | None, ids: list[int] | None
) -> GenerationSettings:
    """The settings with these stop strings and ids, if any, instead of the model's.

    Raises:
      InputError: a string is empty, or an id is not a token id.
    """
    if strings:
        settings = dataclasses.replace(settings, stop_strings=check_stop_strings(strings))
    try:
        return dataclasses.replace(settings, stop_ids=tuple(ids)) if ids else settings
    except InputError as error:
        raise _reworded(error, where="--stop-id", hint="give ids of the model's tokenizer") from error


def _reworded(error: InputError, *, where: str | None, hint: str) -> InputError:
    """The error, reworded for the command line."""
    return InputError(error.what, where=where, got=error.got, expected=error.expected, hint=hint)
