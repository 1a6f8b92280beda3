"""JSON as its standard has it: no key twice, no NaN, no infinity."""

import json
import math
from collections import Counter
from typing import Any

from polarjax.errors import InputError


def strict_json(text: str | bytes, *, hint: str) -> Any:
    """The value in a text; raises `InputError`, with this hint, if it isn't JSON or holds a number beyond float64."""
    refused = lambda what, got, expected=None: InputError(what, got=got[:80], expected=expected, hint=hint)

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise refused("not JSON", text, "finite numbers")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise refused("a key comes twice", repr(twice))
        return made

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=number, parse_float=number)
    except json.JSONDecodeError as error:
        raise refused("not JSON", f"{error.msg} at character {error.pos + 1}", "an object") from error
    except RecursionError as error:
        raise refused("not JSON", "too many brackets inside each other") from error
    except InputError:
        raise
    except ValueError as error:  # bytes that are no text, whole numbers of thousands of digits
        raise refused("not JSON", str(error)) from error
