"""How `generate` draws tokens and ends texts: its options override what the model asks for."""

from typing import Any

from polarjax.errors import InputError
from polarjax.generation.settings import GenerationSettings
from polarjax.jobs.line_settings import check_value, reworded, with_stops


def check_options(**options: Any) -> None:
    """Raises `InputError` for a value that no model accepts, naming the option.

    Args:
      options: arguments of `GenerationSettings.with_flags`.
    """
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        hint = "correct the value or omit it; --greedy takes the most likely tokens"
        check_value(name, value, where=option, hint=hint)


def with_stop_options(
    settings: GenerationSettings, strings: list[str] | None, ids: list[int] | None
) -> GenerationSettings:
    """The settings with the stop strings and ids of `--stop` and `--stop-id`, if any, instead of the model's.

    Raises:
      InputError: a string is empty, or an id is not a token id.
    """
    settings = with_stops(settings, strings or None, None)
    try:
        return with_stops(settings, None, ids or None)
    except InputError as error:
        raise reworded(error, where="--stop-id", hint="give ids of the model's tokenizer") from error
