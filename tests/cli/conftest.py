"""A model directory, and `polarjax generate` on it."""

from pathlib import Path

import pytest

from polarjax.cli import main as command
from tests.cli.homes import make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model directory whose tokenizer has a chat template and no generation settings of its own."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def run(home, capsys):
    """Runs the verb on `home`, or on the model named first; gives exit code, output and error text."""

    def run(*words: str, model: Path = home) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            command.main(["generate", str(model), *map(str, words)])
        code = exit_.value.code
        return (int(code or 0), *capsys.readouterr())

    return run
