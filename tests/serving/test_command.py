"""`polarjax serve`: what it refuses before it listens, and how it ends on signals."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import polarjax as pj
from polarjax.cli import main as command
from polarjax.cli.serve import KEY_VARIABLE
from polarjax.serving import server as serving_module
from tests.one_line import refuses
from tests.serving.server import Server, bundle

SMALL = ("--slots", "2", "--capacity", "16")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model directory."""
    folder = tmp_path_factory.mktemp("home") / "tiny"
    pj.save(folder, bundle())
    return folder


def line(capsys, *words: object) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as exit_:
        command.main(["serve", *map(str, words)])
    out, err = capsys.readouterr()
    assert (exit_.value.code, out, err.count("\n")) == (2, "", 1), err
    assert "Hint: " in err
    return err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--port", 99999), "--port 99999: can't listen there"),
        (("--port", 0, "--host", "256.1.1.1"), "--host 256.1.1.1"),
        (("--port", 0, "--api-key", ""), "--api-key: unusable API key; got an empty one"),
        (("--port", 0, "--api-key", "a b\n"), "one that no header can hold"),
        (("--port", 0, "--max-waiting", -1), "--max-waiting: max_waiting is not usable; got -1"),
        (("--port", 0, "--max-prompt", 0), "--max-prompt: max_prompt is not usable; got 0"),
        (("--port", 0, "--max-body-mb", -1), "--max-body-mb: not a size; got -1.0, expected megabytes"),
        (("--port", 0, "--max-body-mb", 0), "--max-body-mb: no body is so small; got 0.0, expected more"),
        (("--port", 0, "--slots", 0), "slots is not usable; got 0"),
        (("--port", 0, "--dense", "--head-density", 0.5), "contradict each other"),
        (("--port", 0, "--head-density", 0.5), "the model has no routers yet"),
        (("--port", 0, "--dtype", "int8"), "--dtype"),
    ],
)
def test_bad_options_are_refused_in_one_line(home, capsys, words, named):
    assert named in line(capsys, home, *words)


def test_refusals_name_the_cause(home, capsys, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: can't listen there; got Address already in use" in line(
            capsys, home, "--port", port
        )
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert f"{KEY_VARIABLE}: unusable API key" in line(capsys, home)
    monkeypatch.delenv(KEY_VARIABLE)
    pj.save(tmp_path / "mute", pj.Bundle(bundle().model))
    assert "no tokenizer" in line(capsys, tmp_path / "mute", "--port", 0)
    assert "no such model directory" in line(capsys, tmp_path / "nothing", "--port", 0)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'polarjax[serve]'" in line(capsys, home, "--port", 0)


def test_addresses():
    for host, address in (
        ("127.0.0.1", "http://127.0.0.1:"),
        ("::1", "http://[::1]:"),
        ("0.0.0.0", "http://0.0.0.0:"),
    ):
        with serving_module.listen_on(host, 0) as listening:
            assert serving_module.address_of(listening).startswith(address)
            assert serving_module.is_loopback(listening) == (host != "0.0.0.0")


def test_an_address_that_another_took_meanwhile_is_refused():
    """Servers that start together all get it, as none listens yet; the first one to listen keeps it."""
    with serving_module.listen_on("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with serving_module.listen_on("127.0.0.1", port) as second:
            first.listen()
            with refuses(
                pj.InputError, f"http://127.0.0.1:{port}: can't listen there; got Address already in use"
            ):
                serving_module.run(None, second, api_key=None, ready=lambda: None)


def test_sigterm_under_load_loses_nothing(home):
    """What was taken is finished, what is new is refused, and the exit code is 0; a second signal isn't needed."""
    words = [sys.executable, "-m", "polarjax.cli.main", "serve", str(home), *SMALL, "--port", "0", "--json"]
    environment = os.environ | {KEY_VARIABLE: "s3cret"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment, **pipes) as process, ThreadPoolExecutor(12) as pool:
        ready = process.stderr.readline()
        found = re.search(r"^polarjax: tiny at http://127.0.0.1:(\d+) \(2 slots of 16 tokens\)$", ready)
        assert found is not None, ready
        server = Server(None, None, int(found[1]))
        given = {"prompt": "def f", "max_tokens": 12, "n": 8}
        path, key = "/v1/completions", "Bearer s3cret"
        ask = lambda i: server.send(path, given | {"stream": i % 2 == 1}, Authorization=key)
        taken = [pool.submit(ask, i) for i in range(12)]
        wait_for(process, lambda: server.metric("polarjax_prompt_tokens_total") == 12 * 8 * 3)
        process.send_signal(signal.SIGTERM)
        assert re.search(
            r"^polarjax: finishing \d+ requests?; a second signal ends at once$", process.stderr.readline()
        )
        assert ask(0).status == 503
        assert server.send("/health").status == 503
        assert {each.result().status for each in taken} == {200}
        assert all(each.result().body.endswith(b"data: [DONE]\n\n") for each in taken[1::2])
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    result = json.loads(out)
    assert result["sequences"] == {"stop": 0, "length": 96, "failed": 0, "cancelled": 0}
    assert result["generated_tokens"] == 96 * 12


@pytest.mark.parametrize(
    "active, left", [(0, "stopping"), (1, "finishing 1 request"), (3, "finishing 3 requests")]
)
def test_the_second_signal_ends_at_once(monkeypatch, capsys, active, left):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    service = type("Service", (), {"stopping": False, "active": active})()
    made = serving_module._server(service, None, lambda: None)
    made.handle_exit(signal.SIGINT, None)
    assert service.stopping and ended == []
    assert f"polarjax: {left}; a second signal ends at once" in capsys.readouterr().err
    made.handle_exit(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]


def wait_for(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + 30
    while not reached():
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError
        time.sleep(0.005)
