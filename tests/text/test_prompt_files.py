"""Prompt files, one line at a time: every format, pipes, and what is wrong with a line without an end to the others."""

import contextlib
import json
import lzma
import os
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from polarjax.errors import InputError
from polarjax.text import byte_lines, prompt_files
from polarjax.text.prompt_files import PromptFile, PromptLine
from polarjax.text.prompts import as_json
from tests.one_line import refuses
from tests.text.test_corpus import piped

TWO = [{"prompt": "a", "id": 1}, {"messages": [{"role": "user", "content": "b"}]}]


def every(path: Path) -> list[PromptLine]:
    lines, found = PromptFile(path), []
    while (line := lines.take()) is not None:
        assert (line.prompt is None) == (line.error is not None)
        found.append(line)
    assert lines.take() is None
    return found


def heads(path: Path) -> list[dict]:
    return [dict(line.head) for line in every(path)]


@pytest.mark.parametrize(
    "content",
    [
        "a\r\n\nb",
        "\ufeffa\n \t\r\nb\n\n",
        json.dumps(TWO[0]) + "\n" + json.dumps(TWO[1]),
        '["not", "an object"]\n{"prompt": "a"}',
        "{a\nb\u2028\x85\x0c",
        '{"prompt": "a" and more\n{"prompt": "b"}',
    ],
)
def test_a_pipe_holds_objects_if_its_first_line_is_one(tmp_path: Path, monkeypatch, content):
    file = tmp_path / ("p.jsonl" if content.startswith('{"') else "p.txt")
    file.write_text(content, newline="")
    expected = heads(file)
    assert len(expected) == 2
    with piped(content.encode()) as path:
        assert heads(path) == expected
    for name in ("p.jsonl", "P.JSONL.xz", "p.TXT.xz"):
        if name.lower().startswith(file.name):
            (tmp_path / name).write_bytes(
                lzma.compress(content.encode()) if "xz" in name else content.encode()
            )
            assert heads(tmp_path / name) == expected
    with standard_input(monkeypatch, content):
        assert heads(Path("-")) == expected


@contextlib.contextmanager
def standard_input(monkeypatch, content: str):
    with piped(content.encode()) as path:
        before, reader = os.dup(0), os.open(path, os.O_RDONLY)
        os.dup2(reader, 0)
        try:
            yield
        finally:
            os.dup2(before, 0)
            os.close(before)
            os.close(reader)


def test_lines_that_have_not_come_yet_are_not_waited_for(tmp_path: Path):
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "a"}\n{"prompt": ')
    lines = PromptFile(Path(f"/dev/fd/{reader}"))
    assert lines.survey() is None
    assert lines.take().prompt.text == "a"
    assert lines.take(wait=False) is None
    os.write(writer, b'"b"}')
    assert lines.take(wait=False) is None
    os.close(writer)
    assert lines.take(wait=False).prompt.text == "b"
    assert lines.take(wait=True) is None
    os.close(reader)


def test_standard_input_that_does_not_block_is_waited_for(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    before = os.dup(0)
    os.dup2(reader, 0)
    try:
        first, second = (threading.Timer(0.2 * i, os.write, (writer, b"%d\n" % i)) for i in (1, 2))
        first.start()
        lines = PromptFile(Path("-"))
        second.start()
        assert lines.take().prompt.text == "1"
        assert lines.take(wait=False) is None and not lines.ended
        assert lines.take().prompt.text == "2"
        os.close(writer)
        assert lines.take() is None
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reader)


def test_a_json_file_holds_an_array_of_prompts(tmp_path: Path):
    file = tmp_path / "p.JSON"
    file.write_text(
        json.dumps([*TWO, "c", TWO[1]["messages"], 3, {"prompt": "d", "temperature": 2}], indent=2)
    )
    found = every(file)
    assert [line.head for line in found] == [
        *TWO,
        {"prompt": "c"},
        TWO[1],
        {"entry": 5},
        {"prompt": "d", "temperature": 2},
    ]
    assert str(found[4].error).startswith("not an object; got int")
    assert found[5].settings == {"temperature": 2}
    assert PromptFile(file).survey().count == 6
    file.write_text(json.dumps(TWO[0]))
    assert heads(file) == TWO[:1]


UNREADABLE = {
    "p.json": [
        (b'{"prompt": "a"}\n{"prompt": "b"}', "not JSON; got Extra data.*name it .jsonl"),
        (b"def main(", "not JSON"),
        (b"[" * 100_000, "not JSON; got too many brackets"),
        (b"[]", "no prompts in the file; got an empty array"),
        (b'"a"', "no prompts in the file; got str, expected an array"),
        (b'[{"prompt": "a", "prompt": "b"}]', "a key comes twice"),
    ],
    "p.jsonl": [
        (b"", "there is no prompt in the file"),
        (b"\xef\xbb\xbf\n \r\n\t", "there is no prompt in the file"),
        ('{"prompt": "a"}'.encode("utf-16"), "the prompts are UTF-16; expected UTF-8"),
    ],
    "p.txt.xz": [(b"no archive", "damaged .xz file"), (lzma.compress(b"abc" * 99)[:-9], "damaged .xz file")],
}


@pytest.mark.parametrize(
    ("name", "case"), [(n, i) for n, cases in UNREADABLE.items() for i in range(len(cases))]
)
def test_files_without_prompts_are_refused(tmp_path: Path, name, case):
    content, message = UNREADABLE[name][case]
    (tmp_path / name).write_bytes(content)
    with refuses(InputError, f"{name}: .*{message}"):
        every(tmp_path / name)


@pytest.mark.parametrize("name", ["none.jsonl", ".", "/dev/null"])
def test_what_is_no_file_is_refused(tmp_path: Path, name):
    with refuses(InputError, "cannot read the prompts; got (no such file|a directory|a device)"):
        PromptFile(tmp_path / name)


def test_closed_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with refuses(InputError, "cannot read the prompts; got a closed file"):
        PromptFile(Path("-"))


BAD = {
    b"{": "not JSON; got Expecting property name.* at character 2",
    b"3": "not an object; got int",
    b"{}": "neither prompt nor messages",
    b'{"prompt": null}': "neither prompt nor messages",
    b'{"prompt": "a", "messages": []}': "both prompt and messages",
    b'{"prompt": 3}': "prompt is not a text or a list of token ids",
    b'{"prompt": []}': "prompt is not a text or a list of token ids",
    b'{"prompt": [1, true]}': "prompt is not a text or a list of token ids",
    b'{"prompt": [1, 99999999999999999999]}': "prompt is not a text or a list of token ids",
    b'{"messages": []}': "messages is not a list",
    b'{"messages": [{"role": "user"}]}': "messages is not a list",
    b'{"prompt": "a", "prompt": "b"}': "a key comes twice; got 'prompt'",
    b'{"prompt": "a", "id": {"x": 1, "x": 1}}': "a key comes twice; got 'x'",
    b'{"prompt": "a", "max_token": 3}': "unknown key; got 'max_token', expected id, prompt",
    b'{"prompt": "a", "error": 3}': "unknown key; got 'error'",
    b'{"prompt": "a", "temperature": NaN}': "not JSON; got NaN, expected finite numbers",
    b'{"prompt": "a", "id": -Infinity}': "not JSON; got -Infinity",
    b'{"prompt": "a", "id": 1e999}': "not JSON; got 1e999",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}": "not JSON; got Exceeds the limit",
    b'{"prompt": "\xff"}': "not UTF-8; got byte 0xff at byte 13 of the line",
    b'{"prompt": "a\0"}': "not JSON; got Invalid control character",
    b"[" * 100_000: "not JSON; got too many brackets",
    b'{"prompt": "' + b"a" * 300_000 + b'"}': "the line is too long; expected at most 200,000 bytes",
}


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_bad_line_is_an_error_of_its_own(tmp_path: Path, monkeypatch, ending):
    for module in (byte_lines, prompt_files):
        monkeypatch.setattr(module, "LONGEST_LINE", 200_000)
    good = b'{"prompt": "good", "id": [1.5, null]}'
    (tmp_path / "in.jsonl").write_bytes(ending.join(each for line in BAD for each in (line, b"", good)))
    found = every(tmp_path / "in.jsonl")
    assert [line.head for line in found[1::2]] == [{"prompt": "good", "id": [1.5, None]}] * len(BAD)
    for i, ((raw, message), line) in enumerate(zip(BAD.items(), found[::2], strict=True)):
        with refuses(InputError, message):
            raise line.error
        assert line.name == f"line {1 + 3 * i}"
        assert line.head == {"line": 1 + 3 * i} or line.head.items() <= json.loads(raw).items()
        assert line.head.keys().isdisjoint(prompt_files.ANSWERS)


def test_a_line_of_many_keys_takes_a_moment(tmp_path: Path):
    """Looking for the one that comes twice takes no longer than reading them."""
    keys = ",".join(f'"{i}":0' for i in range(80_000))
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "a", "id": {{{keys},"79999":0}}}}')
    began = time.process_time()
    (line,) = every(tmp_path / "in.jsonl")
    with refuses(InputError, "a key comes twice; got '79999'"):
        raise line.error
    assert time.process_time() - began < 10


def test_a_text_that_is_not_utf8_stops_no_other(tmp_path: Path):
    (tmp_path / "in.txt").write_bytes(b" def f\n\xff\xfe\n\nx\0\r\n")
    found = every(tmp_path / "in.txt")
    assert [line.head for line in found] == [{"prompt": " def f"}, {"line": 2}, {"prompt": "x\0"}]


def test_what_the_output_repeats_is_one_line():
    value = {"id": "\ud800 \u2028\u2029\x85\n\r\x1c 日本", "\\\udfff": [1e300, -0.0, 10**25]}
    line = as_json(value)
    assert len(line.splitlines()) == 1
    assert "日本" in line
    assert json.loads(line.encode()) == value


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    (tmp_path / "in.txt").write_text("a prompt of some length\n" * 10_000)
    tracemalloc.start()
    with PromptFile(tmp_path / "in.txt") as lines:
        survey, count = lines.survey(), 0
        assert survey is not None and survey.count == 10_000
        while lines.take() is not None:
            count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (count, peak < 300_000) == (10_000, True), peak


def test_the_survey_tells_files_apart_and_counts_prompts(tmp_path: Path):
    surveys = set()
    for i, content in enumerate(["a\n\nb\n", "a\nb\n\n", "a\nb\nc", "\ufeff\na\nb"]):
        (tmp_path / f"{i}.txt").write_text(content)
        with PromptFile(tmp_path / f"{i}.txt", ["x"]) as lines:
            survey = lines.survey()
        assert survey is not None
        assert survey.count == 3 + (i == 2)
        surveys.add(survey)
    assert len(surveys) == 4
    for name, asks in (("a.jsonl", True), ("a.txt", False), ("a.json", True)):
        (tmp_path / name).write_text('{"prompt": "a", "logprobs": 0}')
        with PromptFile(tmp_path / name) as lines:
            survey = lines.survey()
        assert survey is not None
        assert survey.logprobs == asks
