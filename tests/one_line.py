"""How a refusal must look."""

import contextlib
import re
from collections.abc import Iterator

import pytest

from polarjax.errors import PolarjaxError


@contextlib.contextmanager
def refuses(kind: type[PolarjaxError], pattern: str) -> Iterator[None]:
    """Passes if the block raises exactly `kind`, in one line that matches `pattern` and says how to fix it."""
    with pytest.raises(kind) as caught:
        yield
    line = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in line
    assert re.search(pattern, line), f"{line!r} does not match {pattern!r}"
    assert ". Hint: " in line, f"{line!r} does not say how to fix it"
