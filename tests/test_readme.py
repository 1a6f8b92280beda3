"""Every command and Python block of the README runs, in order, in a folder that looks like a clone."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """One shell command, or one Python block, and the line of the README it begins on."""

    language: str
    line: int
    text: str


def snippets(markdown: str) -> list[Snippet]:
    found = []
    for block in FENCE.finditer(markdown):
        line = markdown.count("\n", 0, block.start()) + 2
        if block[1] == "python":
            found.append(Snippet("python", line, block[2]))
        elif block[1] in {"console", "bash"}:
            found.extend(commands(block[2], line, prompt="$ " if block[1] == "console" else ""))
    return found


def commands(text: str, first_line: int, prompt: str) -> list[Snippet]:
    """The commands of a shell block: with a prompt, other lines are output; a final backslash continues a line."""
    joined = re.sub(r"\\\n\s*", lambda match: " " + "\0" * match[0].count("\n"), text)
    found, line = [], first_line
    for each in joined.splitlines():
        command = each.replace("\0", "").partition(" #")[0].strip()
        if command.startswith(prompt) and not command.startswith("#") and command:
            found.append(Snippet("shell", line, command.removeprefix(prompt)))
        line += 1 + each.count("\0")
    return found


def makes(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", ROOT.joinpath("Makefile").read_text(), re.MULTILINE)
    assert {word for word in words[1:] if "=" not in word} <= set(targets)


def installs(words: list[str]) -> None:
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    wanted = [word for word in words if re.match(r"(polarjax|\.)(\[|$)", word)]
    assert wanted, f"installs something else than polarjax: {words}"
    extras = {extra for word in wanted for extra in re.findall(r"[\w-]+", word.partition("[")[2])}
    assert extras <= set(project["optional-dependencies"])


def clones(words: list[str]) -> None:
    assert words[1] == "clone"
    assert words[-1].removesuffix(".git").endswith("polarjax")


def changes_folder(words: list[str]) -> None:
    assert words[1:] == ["polarjax"]


# commands that set up a machine: what they name must exist, but they are not run
CHECKED: dict[str, Callable[[list[str]], None]] = {
    "make": makes,
    "pip": installs,
    "uv": installs,
    "git": clones,
    "cd": changes_folder,
}


# calls of `polarjax` in processes of their own, by the script that pip installs
STARTED = (["polarjax", "--help"],)


class Served:
    """The server that the README starts, on a port that is free; it runs until the tests have ended."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = str(free.getsockname()[1])
        self._process: subprocess.Popen[str] | None = None

    def moved(self, text: str) -> str:
        """A command with the port that is used here."""
        return text.replace("8000", self._port)

    def start(self, words: list[str], folder: Path) -> None:
        """Starts the server, and waits until it takes requests."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self._process = subprocess.Popen(words, cwd=folder, env=environment(), **pipes)
        line = next((each for each in self._process.stdout if each.startswith("polarjax: ")), "")
        assert f"model at http://127.0.0.1:{self._port} (" in line

    def stop(self) -> None:
        """Ends it as a user does."""
        if self._process is not None:
            self._process.terminate()
            self._process.communicate(timeout=60)
            assert self._process.returncode == 0


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder with links to everything in the project, so that what a command writes lands elsewhere."""
    folder = tmp_path_factory.mktemp("readme") / "polarjax"
    folder.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            folder.joinpath(entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def python(clone) -> Iterator["Python"]:
    made = Python(clone)
    yield made
    made.stop()


def environment() -> dict[str, str]:
    """Where `polarjax` is the one of these tests."""
    return os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


class Python:
    """One process for all Python blocks, each in a namespace of its own, and for calls of the command: starting one is
    slower than most of them."""

    LOOP = """if True:
        import json, sys, traceback
        sys.path.insert(0, "")
        for line in sys.stdin:
            try:
                exec(compile(json.loads(line), "README.md", "exec"), {"__name__": "__main__"})
                error = ""
            except BaseException:
                error = traceback.format_exc()
            print(json.dumps({"error": error}), flush=True)
    """

    def __init__(self, folder: Path) -> None:
        self._printed = (folder.parent / "printed").open("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._printed, "text": True}
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.LOOP], cwd=folder, env=environment(), **pipes
        )

    def command(self, words: list[str]) -> None:
        """Runs `polarjax` with these words as the installed script does; an exit code other than 0 fails the test."""
        self.run(
            "from polarjax.cli.main import main\n"
            f"try:\n    main({words!r})\n"
            "except SystemExit as ended:\n    assert not ended.code, f'exit code {ended.code}'"
        )

    def run(self, block: str) -> None:
        """Runs a block; what it raises fails the test."""
        self._process.stdin.write(json.dumps(block) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"error": '):
                assert (error := json.loads(line)["error"]) == "", f"{error}\n{self._errors()}"
                return
        raise AssertionError(f"a block ended the process: {self._errors()}")

    def _errors(self) -> str:
        self._printed.seek(0)
        return self._printed.read()[-2000:]

    def stop(self) -> None:
        """Ends it."""
        self._process.communicate(timeout=60)
        self._printed.close()
        assert self._process.returncode == 0


def run(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "snippet", snippets(README.read_text()), ids=lambda each: f"line-{each.line}-{each.text.split()[0]}"
)
def test_readme(snippet, clone, served, python):
    if "import ray\n" in snippet.text:
        pytest.skip("tests/jobs/test_ray.py runs it, where Ray is installed")
    if snippet.language == "python":
        python.run(snippet.text)
        return
    words = shlex.split(served.moved(snippet.text))
    if words[0] in CHECKED:
        CHECKED[words[0]](words)
    elif words[:2] == ["polarjax", "serve"]:
        served.start(words, clone)
    elif words[:2] in STARTED or words[0] != "polarjax":
        failing = "--fail-with-body " if words[0] == "curl" else ""
        command = (
            served.moved(snippet.text).replace("curl ", f"curl {failing}", 1) if failing else snippet.text
        )
        run(["bash", "-euo", "pipefail", "-c", command], clone)
    else:
        python.command(words[1:])


def test_the_reader_finds_commands_and_blocks():
    console = "```console\n$ make demo  # all\nout\n$ ls \\\n    -l\n$ pwd\n```\n"
    others = "```bash\n# no\nls\n```\n```python\n1\n```\n"
    assert snippets("A\n" + console + others) == [
        Snippet("shell", 3, "make demo"),
        Snippet("shell", 5, "ls  -l"),
        Snippet("shell", 7, "pwd"),
        Snippet("shell", 11, "ls"),
        Snippet("python", 14, "1\n"),
    ]


@pytest.mark.parametrize(
    "line", ["make demmo", "pip install 'polarjax[cuda99]'", "git clone a/b", "cd elsewhere"]
)
def test_setup_commands_that_name_nothing_fail(line):
    words = shlex.split(line)
    with pytest.raises(AssertionError):
        CHECKED[words[0]](words)


def test_readme_shows_what_matters():
    lines = {snippet.text for snippet in snippets(README.read_text())}
    assert {"make demo", "make test"} <= lines


def test_ci_runs_the_readmes_test_command():
    assert "exec make test" in ROOT.joinpath(".ci", "run").read_text().splitlines()
