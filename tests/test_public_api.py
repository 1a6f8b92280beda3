"""The public names, listed here once more so that none comes or goes unnoticed, and their documentation."""

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

import polarjax

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "polarjax": [
        "OVERLAP",
        "Bundle",
        "Categorical",
        "CheckpointError",
        "Completion",
        "Decoder",
        "Engine",
        "Event",
        "Generation",
        "GenerationSettings",
        "Greedy",
        "InputError",
        "KVCache",
        "Layout",
        "ModelConfig",
        "PlanTable",
        "PolarjaxError",
        "RopeConfig",
        "Sparsity",
        "SparsityError",
        "SparsityPlan",
        "TextStream",
        "TokenStream",
        "UnsupportedConfigError",
        "costs",
        "decode_step",
        "distributed",
        "evaluation",
        "forward",
        "generate",
        "init_cache",
        "jobs",
        "load",
        "loop_options",
        "prefill",
        "save",
        "shard",
        "sparsity",
        "stream",
    ],
    "polarjax.sparsity": [
        "TuneOptions",
        "calibrate",
        "collect",
        "refine",
        "sparsify",
        "train_routers",
        "tune",
    ],
    "polarjax.evaluation": [
        "GreedyOptions",
        "Report",
        "agreement",
        "perplexity",
        "static_selector",
        "sweep",
    ],
    "polarjax.distributed": ["initialize"],
    "polarjax.jobs": ["CompletePrompts"],
    "pallas_kernels": [
        *("Choice", "Link", "all_reduce_norm", "connect"),
        *("record_backends", "select_top_k", "sparse_decode_attention", "sparse_mlp"),
    ],
    "checkpoints_convert": [
        "Conversion",
        "Description",
        "Export",
        "UnsupportedConfigError",
        "config_from_hf",
        "convert_checkpoint",
        "describe_checkpoint",
        "export_checkpoint",
    ],
}
SOURCES = sorted(
    path.relative_to(ROOT)
    for package in ("polarjax", "pallas_kernels", "checkpoints_convert")
    for path in ROOT.joinpath(package).rglob("*.py")
)


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package])
    assert not [name for name in module.__all__ if not hasattr(module, name)]


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in PUBLIC.items() for name in names]
)
def test_public_names_are_documented(package, name):
    value = getattr(importlib.import_module(package), name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        methods = {key: each for key, each in vars(value).items() if inspect.isfunction(each)}
        assert not [key for key, each in methods.items() if not key.startswith("_") and not each.__doc__]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_modules_and_what_they_define_are_documented(path):
    module = ast.parse(ROOT.joinpath(path).read_text())
    defined = [each for each in module.body if isinstance(each, ast.FunctionDef | ast.ClassDef)]
    public = [each for each in defined if not each.name.startswith("_")]
    assert path.name == "__init__.py" or ast.get_docstring(module)
    assert not [each.name for each in public if not ast.get_docstring(each)]


def test_version_is_that_of_the_distribution():
    assert polarjax.__version__ == version("polarjax")
