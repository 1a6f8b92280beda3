"""Linter, formatter and type checker: a change that does not pass them is not done."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["pyright", "--pythonpath", sys.executable]],
    ids=["ruff-check", "ruff-format", "pyright"],
)
def test_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("folders", "most"),
    [(("polarjax", "checkpoints_convert", "bench"), 350), (("pallas_kernels", "tests"), 450)],
)
def test_files_are_short(folders, most):
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert files
    assert [path.name for path in files if len(path.read_text("utf-8").splitlines()) > most] == []
