"""The command's frame: the verb table, help, `--json`, errors and exit codes, with a verb made here."""

import gc
import importlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import typer

from polarjax import progress
from polarjax.cli import main as command
from polarjax.errors import CheckpointError


def stretch(
    folder: Annotated[Path, typer.Argument(help="Where to.")],
    *,
    factor: Annotated[int, typer.Option(help="How far.")] = 1,
) -> dict[str, Any]:
    """Stretches a folder."""
    if factor < 1:
        raise CheckpointError(
            "cannot shrink", where="--factor", got=factor, expected="1 or more", hint="leave it out"
        )
    print("stretching", folder)
    with progress.task("stretch", 3, "steps") as advance:
        advance(3, note="done")
    odd = {"none": [float("inf"), np.float64("nan")]}
    return {"folder": folder, "factor": np.float32(factor), "sizes": np.arange(3), **odd}


@pytest.fixture
def polarjax(monkeypatch, capsys):
    """Runs the command with the verb `stretch` added; gives exit code, standard output and standard error."""
    monkeypatch.setitem(command.VERBS, "stretch", command.Verb(f"{__name__}:stretch", "Make it longer."))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            command.main(words)
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("words", [("stretch", "out"), ("stretch", "out", "--factor", "0"), ("stretc",)])
def test_garbage_collection_is_rare_only_while_the_command_runs(polarjax, monkeypatch, words):
    seen, of_tests, app = [], gc.get_threshold(), command._app
    monkeypatch.setattr(command, "_app", lambda called: seen.append(gc.get_threshold()) or app(called))
    usual = (700, 10, 10)
    gc.set_threshold(*usual)
    try:
        polarjax(*words)
        assert seen[0][0] > usual[0]
        assert gc.get_threshold() == usual
    finally:
        gc.set_threshold(*of_tests)


def test_help_lists_every_verb(polarjax):
    code, out, _ = polarjax("--help")
    assert code == 0
    single = {name: verb.summary for name, verb in command.VERBS.items() if " " not in name}
    assert [line for each in (single | command.GROUPS).items() for line in each if line not in out] == []


@pytest.mark.parametrize("group", command.GROUPS)
def test_help_of_a_group_lists_its_verbs(polarjax, group):
    code, out, _ = polarjax(group, "--help")
    members = {name: verb.summary for name, verb in command.VERBS.items() if name.startswith(f"{group} ")}
    assert code == 0
    assert members
    assert [
        line for name, summary in members.items() for line in (name.split()[1], summary) if line not in out
    ] == []


def test_help_of_a_verb_shows_its_own_text_and_json(polarjax):
    code, out, _ = polarjax("stretch", "--help")
    assert code == 0
    assert all(text in out for text in ("Stretches a folder.", "--factor", "--json"))


def test_version(polarjax):
    assert polarjax("--version") == (0, "polarjax 0.1.0\n", "")


def test_a_verb_prints_for_people(polarjax):
    code, out, err = polarjax("stretch", "a/b")
    assert (code, out) == (0, "stretching a/b\n")
    assert err.startswith("stretch: 3/3 steps, ")


def test_json_has_standard_output_for_itself(polarjax):
    code, out, err = polarjax("stretch", "a/b", "--factor", "2", "--json")
    assert code == 0
    assert json.loads(out) == {"folder": "a/b", "factor": 2.0, "sizes": [0, 1, 2], "none": [None, None]}
    assert err.startswith("stretching a/b\n")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_bad_input_is_one_line_and_exit_code_2(polarjax, extra):
    expected = "polarjax: --factor: cannot shrink; got 0, expected 1 or more. Hint: leave it out\n"
    assert polarjax("stretch", "a", "--factor", "0", *extra) == (2, "", expected)


def test_a_file_that_may_not_be_used_is_one_line(polarjax, monkeypatch):
    error = PermissionError(13, "Permission denied", "a/b")
    monkeypatch.setattr(progress, "task", lambda *_: (_ for _ in ()).throw(error))
    code, _, text = polarjax("stretch", "a")
    assert code == 2
    assert text.startswith("polarjax: a/b: this file can't be used; got Permission denied. Hint: ")


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        ("strict", rb"stretching h\xe9 \U0001f600 \udcff"),
        ("surrogateescape", rb"stretching h\xe9 \U0001f600 \udcff"),
        ("replace", b"stretching h? ? ?"),
    ],
)
def test_what_the_terminal_cannot_show_is_escaped(polarjax, monkeypatch, errors, shown):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors=errors))
    assert polarjax("stretch", "h\xe9 \U0001f600 \udcff")[0] == 0
    sys.stdout.flush()
    assert raw.getvalue().strip() == shown


def test_json_is_json_in_every_encoding(polarjax, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert polarjax("stretch", "\xe9 \U0001f600", "--json")[0] == 0
    sys.stdout.flush()
    assert json.loads(raw.getvalue())["folder"] == "\xe9 \U0001f600"


def test_ctrl_c_while_the_verb_is_imported_is_quiet(polarjax, monkeypatch):
    def interrupt(module: str):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupt)
    assert polarjax("stretch", "a") == (130, "", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_that_python_ignores_come_again(polarjax, monkeypatch, number, code):
    def collected(phase: str, info: dict) -> None:
        gc.callbacks.remove(collected)
        signal.raise_signal(number)

    def wait() -> dict[str, Any]:
        gc.callbacks.append(collected)
        gc.collect()
        time.sleep(60)
        return {}

    monkeypatch.setattr(sys.modules[__name__], "stretch", wait)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert polarjax("stretch") == (code, "", "")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["strech"], "strech"),
        (["eval"], "perplexity"),
        (["eval", "model"], "model"),
        (["stretch"], "folder"),
        (["stretch", "a", "--fast"], "--fast"),
    ],
)
def test_wrong_usage_names_the_word_and_exits_with_2(polarjax, words, named):
    code, out, err = polarjax(*words)
    assert (code, out) == (2, "")
    assert named in err


def test_help_imports_no_heavy_optional_library():
    code = (
        "import sys\nfrom polarjax.cli.main import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "polarjax.cli.main" in loaded
    assert not {"torch", "transformers", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("verb", list(command.VERBS))
def test_every_verb_can_be_called(polarjax, verb):
    code, out, _ = polarjax(*verb.split(), "--help")
    assert code == 0
    assert out.startswith(f"Usage: polarjax {verb} ")
