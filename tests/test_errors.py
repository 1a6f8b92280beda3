"""An error is one line: where, what, got, expected, hint."""

import pytest

from polarjax import errors


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "file is truncated"),
        ({"where": "a.bin"}, "a.bin: file is truncated"),
        ({"got": 3}, "file is truncated; got 3"),
        ({"got": 0, "expected": 5}, "file is truncated; got 0, expected 5"),
        (
            {"where": "a", "expected": "b", "hint": "copy it again"},
            "a: file is truncated; expected b. Hint: copy it again",
        ),
        ({"got": "two\n lines"}, "file is truncated; got two lines"),
        ({"got": "\x1b[2Kn\u202eame ×…\udcff"}, r"file is truncated; got \x1b[2Kn\u202eame ×…\udcff"),
    ],
)
def test_one_line(parts, line):
    assert str(errors.PolarjaxError("file is truncated", **parts)) == line


@pytest.mark.parametrize("kind", ["UnsupportedConfigError", "CheckpointError", "InputError", "SparsityError"])
def test_kinds_are_value_errors_of_polarjax(kind):
    error = getattr(errors, kind)("no", where="here")
    assert isinstance(error, errors.PolarjaxError)
    assert isinstance(error, ValueError)
    assert (error.what, error.where, error.hint) == ("no", "here", None)
