"""Who may import whom (read from the source, not run), and what `import polarjax` must leave alone."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("polarjax", "pallas_kernels", "checkpoints_convert")
OPTIONAL = {
    "datasets",
    "google",
    "lm_eval",
    "matplotlib",
    "pyarrow",
    "ray",
    "sentencepiece",
    "starlette",
    "torch",
    "uvicorn",
}
KERNELS_MAY_USE = {"jax", "jaxlib", "numpy", "jaxtyping"}
FLOORS = {
    "polarjax": (
        "lazy types errors progress",
        "numeric",
        "configs",
        "storage distributed",
        "selection",
        "model",
        "costs sharding",
        "memory",
        "generation",
        "text",
        "checkpoint",
        "engine",
        "serving sparsity evaluation jobs",
        "demo",
        "cli",
        "__init__",
    ),
    "pallas_kernels": (
        "_inline _device _tuned",
        "_dispatch",
        "all_reduce_norm decode_attention selection sparse_mlp",
        "autotune",
        "__init__",
    ),
}
"""Folders, and files beside them, from the lowest up: each may import those on floors below its own, and itself."""

CONVERTER_MAY_USE = {
    f"polarjax.{name}"
    for name in (
        "configs",
        "model",
        "checkpoint",
        "storage",
        "text",
        "errors",
        "types",
        "numeric",
        "progress",
    )
}


class Import(NamedTuple):
    """One imported module: by which file, from which line, which names of it, and whether at module level."""

    file: Path
    line: int
    module: str
    names: tuple[str, ...]
    at_top: bool

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return (
            f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module} {' '.join(self.names)}".strip()
        )


def imports_of(package: str) -> list[Import]:
    files = sorted(ROOT.joinpath(package).rglob("*.py"))
    return [found for file in files for found in imports_in(file, ast.parse(file.read_text()), at_top=True)]


def imports_in(file: Path, node: ast.AST, *, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(file, child.lineno, alias.name, (), at_top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}:{child.lineno}: relative import"
            names = tuple(alias.name for alias in child.names)
            yield Import(file, child.lineno, child.module or "", names, at_top)
        elif not is_type_checking_block(child):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_in(file, child, at_top=at_top and not inside)


def is_type_checking_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def wing(module: str) -> str:
    """The folder, or the file beside folders, that a dotted name is in: polarjax.model for polarjax.model.decoder."""
    return ".".join(module.split(".")[:2])


def wings(found: Import) -> set[str]:
    """What an import reaches; a package's own face is its top floor."""
    if found.module in FLOORS:
        inside = {name for floor in FLOORS[found.module] for name in floor.split()}
        return {f"{found.module}.{name if name in inside else '__init__'}" for name in found.names or ("",)}
    return {wing(found.module)}


def home(found: Import) -> str:
    return wing(".".join(found.file.relative_to(ROOT).with_suffix("").parts))


def runs_up(found: Import, package: str) -> bool:
    floor = {f"{package}.{name}": i for i, names in enumerate(FLOORS[package]) for name in names.split()}
    return any(floor[each] >= floor[home(found)] for each in wings(found) - {home(found)})


def allowed_in_converter(found: Import) -> bool:
    return wings(found) <= CONVERTER_MAY_USE


def uses_only_public_names(found: Import, package: str) -> bool:
    return found.module == package and set(found.names) <= set(importlib.import_module(package).__all__)


def assert_none(wrong: list[Import]) -> None:
    assert not wrong, "\n".join(map(str, wrong))


def is_standard(name: str) -> bool:
    return name in sys.stdlib_module_names


@pytest.mark.parametrize("package", FLOORS)
def test_every_folder_has_its_floor(package):
    names = {
        each.stem
        for each in ROOT.joinpath(package).iterdir()
        if each.suffix == ".py" or any(each.glob("*.py"))
    }
    assert names == {name for floor in FLOORS[package] for name in floor.split()}


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_runs_up(package):
    inside = [each for each in imports_of(package) if each.root == package]
    assert_none([each for each in inside if runs_up(each, package)])


def test_no_file_imports_itself_through_others():
    """Inside functions, too."""
    needs: dict[str, set[str]] = {}
    files = {module_of(file) for package in PACKAGES for file in ROOT.joinpath(package).rglob("*.py")}
    for each in (found for package in PACKAGES for found in imports_of(package)):
        reached = {f"{each.module}.{name}" for name in each.names} & files or {each.module} & files
        needs.setdefault(module_of(each.file), set()).update(reached)
    TopologicalSorter(needs).prepare()  # raises a CycleError that names them


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_few_files_stand_beside_the_folders():
    assert len(list(ROOT.joinpath("polarjax").glob("*.py"))) <= 10


def test_kernels_use_jax_jaxlib_numpy_and_jaxtyping_only():
    allowed = KERNELS_MAY_USE | {"pallas_kernels"}
    found = imports_of("pallas_kernels")
    assert_none([each for each in found if not is_standard(each.root) and each.root not in allowed])


def test_polarjax_uses_public_names_of_kernels_only():
    found = [each for each in imports_of("polarjax") if each.root == "pallas_kernels"]
    assert_none([each for each in found if not uses_only_public_names(each, "pallas_kernels")])


def test_polarjax_uses_the_converter_in_its_commands_only():
    found = [each for each in imports_of("polarjax") if each.root == "checkpoints_convert"]
    assert_none(
        [
            each
            for each in found
            if each.file.parent != ROOT / "polarjax" / "cli"
            or not uses_only_public_names(each, "checkpoints_convert")
        ]
    )


def test_converter_uses_configs_model_and_checkpoint_only():
    found = imports_of("checkpoints_convert")
    assert_none([each for each in found if each.root == "polarjax" and not allowed_in_converter(each)])
    assert_none([each for each in found if each.root == "pallas_kernels"])


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_uses_tests_or_bench(package):
    assert_none([each for each in imports_of(package) if each.root in {"tests", "bench"}])


@pytest.mark.parametrize("package", PACKAGES)
def test_optional_dependencies_are_imported_where_they_are_used(package):
    assert_none([each for each in imports_of(package) if each.at_top and each.root in OPTIONAL])


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_a_declared_dependency(package):
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    declared = {distribution_name(each) for each in project["dependencies"] + extras}
    declared.add("jaxlib")  # jax's other half, pinned by it
    owners = packages_distributions()
    assert_none(
        [
            each
            for each in imports_of(package)
            if not is_standard(each.root)
            and each.root not in PACKAGES
            and not declared & {owner.lower() for owner in owners.get(each.root, [each.root])}
        ]
    )


def distribution_name(requirement: str) -> str:
    return "".join(each if each.isalnum() or each in "-_" else " " for each in requirement).split()[0].lower()


def test_import_polarjax_loads_no_heavy_optional_module():
    touch = "[getattr(pj, name) for name in pj.__all__]"
    code = f"import json, sys, polarjax as pj; {touch}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not loaded & OPTIONAL - {"google"}
    assert not {name for name in loaded if name.startswith("transformers.model")}


@pytest.mark.parametrize(
    ("source", "at_top"),
    [
        ("import torch", True),
        ("def f():\n    import torch", False),
        ("try:\n    from torch import nn\nexcept ImportError:\n    pass", True),
        ("class A:\n    import torch", True),
    ],
)
def test_the_reader_tells_module_level_imports(source, at_top):
    (found,) = imports_in(ROOT / "a.py", ast.parse(source), at_top=True)
    assert (found.root, found.at_top) == ("torch", at_top)
