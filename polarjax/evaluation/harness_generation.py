"""What lm-evaluation-harness asks of a generation, as polarjax's options."""

from collections.abc import Iterable, Mapping
from typing import Any

from polarjax.errors import InputError
from polarjax.generation.settings import GenerationSettings
from polarjax.text.continuation import ContinueOptions

_OURS = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def generation_options(
    asked: Mapping[str, Any], settings: GenerationSettings, *, eos: str | None, room: int
) -> ContinueOptions:
    """The options of a request; as in transformers, what it leaves open comes from the model's own settings.

    Args:
      asked: `until`, `max_gen_toks`, `do_sample`, `temperature` and others, as lm-eval's `normalize_gen_kwargs` returns
        them. Without `do_sample` the most likely tokens are taken.
      settings: the model's.
      eos: text of the token that ends a text; always a stop string.
      room: the model's positions, of which one at least must be left for the context.

    Raises:
      InputError: a value is out of its range, or an option isn't supported and would change the texts.
    """
    given = {key: value for key, value in asked.items() if value is not None}
    until, most = given.pop("until", ()), given.pop("max_gen_toks")
    ignored = GenerationSettings.from_json(given).ignored
    if ignored:
        raise InputError(
            "unsupported generation options",
            where="generate_until",
            got=", ".join(ignored),
            expected=f"until, max_gen_toks, {', '.join(_OURS)}",
            hint="remove them from the task's generation_kwargs",
        )
    if not 0 < most < room:
        raise InputError(
            "max_gen_toks leaves no room for the context" if most > 0 else "no token is to be generated",
            where="generate_until",
            got=most,
            expected=f"1 to {room - 1}",
            hint=f"{'lower' if most > 0 else 'raise'} it, in the task's generation_kwargs or --gen-kwargs",
        )
    own = settings.to_json()
    if not settings.do_sample and settings.top_k is None:
        del own["top_k"]  # from_json knows the default of drawing
    merged = GenerationSettings.from_json(own | {key: given[key] for key in _OURS if key in given})
    return ContinueOptions.of(
        merged, max_new_tokens=most, stop_strings=_stops((*until, *merged.stop_strings, eos))
    )


def _stops(strings: Iterable[Any]) -> tuple[Any, ...]:
    """Each string once, without the empty ones, which lm-eval ignores."""
    return tuple(dict.fromkeys(each for each in strings if each is not None and each != ""))
