"""A prompt's own sampling settings: they override the job's, which override the model's."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from polarjax.errors import InputError
from polarjax.generation.checks import check_stop_ids
from polarjax.generation.settings import GENERATION_CONFIG, GenerationSettings
from polarjax.numeric import shown
from polarjax.text.assembly import check_stop_strings


def check_value(name: str, value: Any, *, where: str | None, hint: str) -> None:
    """Raises `InputError` for a value of an argument of `GenerationSettings.with_flags` that no model accepts."""
    try:
        GenerationSettings().with_flags(**{name: value})
    except InputError as error:
        raise reworded(error, where=where, hint=hint) from error


def with_options(settings: GenerationSettings, *, greedy: bool, **options: Any) -> GenerationSettings:
    """The model's settings, overridden by options that `check_value` has checked.

    Raises:
      InputError: an option contradicts `greedy`, or the model's file has an unusable value that would now be used.
    """
    with _naming_the_file():
        return settings.with_flags(greedy=greedy, **options)


def with_line(settings: GenerationSettings, given: Mapping[str, Any]) -> GenerationSettings:
    """The job's settings, overridden by those that a line gives; raises `InputError` for an unusable one."""

    def check(name: str, value: Any) -> None:
        hint = "correct the value or leave it out"
        if isinstance(value, list):  # one for each row
            raise InputError(f"{name} is not usable", got=shown(value), expected="a number", hint=hint)
        check_value(name, value, where=None, hint=f"{hint}; temperature 0 takes the most likely tokens")

    with _naming_the_file():
        return settings.asked(given, check)


def with_stops(settings: GenerationSettings, strings: Any, ids: Any) -> GenerationSettings:
    """The settings with these stop strings and ids (one, or several) instead of theirs; None keeps theirs.

    Raises:
      InputError: a string is empty, or an id is not a token id.
    """
    stops: dict[str, Any] = {}
    if strings is not None:
        several = isinstance(strings, Sequence) and not isinstance(strings, str)
        stops["stop_strings"] = check_stop_strings(strings if several else [strings])
    if ids is not None:
        stops["stop_ids"] = check_stop_ids(ids)
    return dataclasses.replace(settings, **stops)


@contextlib.contextmanager
def _naming_the_file() -> Iterator[None]:
    """Says that a value which was not given comes from the model's file."""
    try:
        yield
    except InputError as error:
        if error.where is None:  # what was given
            raise
        hint = "give an option for it too, or greedy alone"
        raise reworded(error, where=f"the model's {GENERATION_CONFIG}", hint=hint) from error


def reworded(error: InputError, *, where: str | None, hint: str) -> InputError:
    """The error at another place, with another hint."""
    return InputError(error.what, where=where, got=error.got, expected=error.expected, hint=hint)
