"""How `generate` draws tokens and ends texts: its options override what the model asks for."""

import dataclasses
from typing import Any

from polarjax.errors import InputError
from polarjax.generation.settings import GenerationSettings
from polarjax.jobs.line_settings import check_value, reworded
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
        raise reworded(error, where="--stop-id", hint="give ids of the model's tokenizer") from error
