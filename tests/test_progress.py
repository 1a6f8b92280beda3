"""Progress is silent in a library, a line now and then in the command, and process 0's business alone."""

import re

import jax
import pytest

from polarjax import progress


def without_time(lines: str) -> str:
    return re.sub(r"\d+ s\b", "N s", lines)


def work():
    with progress.task("train", total=4, unit="steps") as advance:
        for steps, loss in ((1, 0.75), (2, 0.5), (1, 0.25)):
            advance(steps, note=f"loss {loss}")


def test_silent_unless_asked(capsys):
    work()
    assert capsys.readouterr() == ("", "")


def test_lines_when_asked(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    with progress.show_lines():
        work()
    out, err = capsys.readouterr()
    assert out == ""
    assert without_time(err).splitlines() == [
        "train: 1/4 steps, N s, loss 0.75",
        "train: 3/4 steps, N s, about N s left, loss 0.5",
        "train: 4/4 steps, N s, loss 0.25",
    ]


def test_lines_are_rare_and_the_last_always_comes(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 1e9)
    with progress.show_lines(), progress.task("add", total=1000, unit="numbers") as advance:
        for _ in range(1000):
            advance()
    assert without_time(capsys.readouterr().err) == "add: 1000/1000 numbers, N s\n"


def test_only_process_0_writes(capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with progress.show_lines():
        work()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    work()
    assert "train" in capsys.readouterr().err


def test_failure_inside_is_not_swallowed():
    with pytest.raises(ZeroDivisionError), progress.show_lines(), progress.task("divide") as advance:
        advance(1 // 0)
