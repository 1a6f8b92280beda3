"""A prompt's own sampling settings: they override the job's, which override the model's."""

from typing import Any

from polarjax.errors import InputError
from polarjax.generation.settings import GENERATION_CONFIG, GenerationSettings


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
    try:
        return settings.with_flags(greedy=greedy, **options)
    except InputError as error:
        if error.where is None:  # greedy and sampling
            raise
        hint = "give an option for it too, or greedy alone"
        raise reworded(error, where=f"the model's {GENERATION_CONFIG}", hint=hint) from error


def reworded(error: InputError, *, where: str | None, hint: str) -> InputError:
    """The error at another place, with another hint."""
    return InputError(error.what, where=where, got=error.got, expected=error.expected, hint=hint)
