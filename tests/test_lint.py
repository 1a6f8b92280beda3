"""Linter, formatter and type checker: a change that does not pass them is not done."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["pyrefly", "check", "--python-interpreter-path", sys.executable, "--min-severity", "error"],
    ],
    ids=["ruff-check", "ruff-format", "pyrefly"],
)
def test_clean(command):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
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


@pytest.mark.parametrize("folder", ["polarjax", "pallas_kernels", "checkpoints_convert", "bench"])
def test_functions_are_short(folder):
    """Docstring and nested functions included, decorators not."""
    long = [
        f"{path.name}: {node.name} has {lines} lines"
        for path in sorted(ROOT.joinpath(folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and (lines := node.end_lineno - node.lineno + 1) > 60
    ]
    assert not long, long


def test_every_refusal_says_how_to_fix_it():
    """Each error of polarjax's own that is raised has a hint; `**` may hold one."""
    kinds = {"PolarjaxError", "UnsupportedConfigError", "CheckpointError", "InputError", "SparsityError"}
    silent = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "polarjax").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if isinstance(node.exc.func, ast.Name) and node.exc.func.id in kinds
        if not {"hint", None} & {keyword.arg for keyword in node.exc.keywords}
    ]
    assert not silent, silent
