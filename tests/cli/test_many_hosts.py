"""`polarjax generate` as two processes of four CPU devices each."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from polarjax.distributed.wire import free_port
from tests.cli.homes import make_home

PROMPTS = [{"id": i, "prompt": f"def f{i}(", "max_new_tokens": 2 + i} for i in range(2)]
SIZES = ("--slots", "2", "--capacity", "40", "--json")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def generate(folder: Path, *words: list) -> list[subprocess.CompletedProcess]:
    """Runs a process for each list of words, at once."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = ("--coordinator", address, "--processes", str(len(words)), "--process-id")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "polarjax.cli.main", "generate", *map(str, each), *options, str(i)],
            cwd=folder,
            env=os.environ | {"XLA_FLAGS": flags},
            **pipes,
        )
        for i, each in enumerate(words)
    ]
    texts = [each.communicate(timeout=200) for each in started]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *t) for p, t in zip(started, texts, strict=True)
    ]


def test_two_processes_go_on_where_one_was_stopped(home, run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    alone, output = tmp_path / "alone.jsonl", tmp_path / "answers.jsonl"
    assert run("--prompts", tmp_path / "prompts.jsonl", "--output", alone, *SIZES, model=home)[0] == 0
    lines = alone.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:1]) + lines[1][:9])
    shutil.copy(f"{alone}.run", f"{output}.run")
    words = ("--prompts", "prompts.jsonl", "--output", "answers.jsonl", "--resume", *SIZES)
    done = generate(tmp_path, *[[home, *words, "--mesh", "data=2,model=4"]] * 2)
    assert [each.returncode for each in done] == [0, 0], done
    assert output.read_text() == alone.read_text()
    assert json.loads(done[0].stdout)["resumed"] == 1
    assert done[1].stdout == ""
    ours = ("polarjax", "answering", "prompts")  # Gloo's threads write there too, into each other's lines
    assert all(word in done[0].stderr for word in ours)
    assert not any(word in done[1].stderr for word in ours), done[1].stderr


def test_what_one_process_lacks_ends_all_with_its_line(home, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    words = ("--prompts", "prompts.jsonl", "--output", "answers.jsonl", "--mesh", "data=2,model=4", *SIZES)
    done = generate(tmp_path, [home, *words], ["nowhere", *words])
    line = (
        f"{tmp_path / 'nowhere'}: no such model directory. Hint: pass a folder that polarjax convert wrote\n"
    )
    assert [each.returncode for each in done] == [2, 2]
    assert done[0].stderr == f"polarjax: process 1 ({socket.gethostname()}) failed: {line}"
    assert done[1].stderr == f"polarjax: {line}"
    assert not (tmp_path / "answers.jsonl").exists()


def test_processes_of_one_run_have_one_coordinator(run):
    code, _, err = run("--prompt", "x", "--processes", "2")
    assert (code, err) == (
        2,
        "polarjax: --processes is for --coordinator. Hint: give --coordinator HOST:PORT too\n",
    )
