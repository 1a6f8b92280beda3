"""What is imported when: nothing heavy for help, `inspect` and `import polarjax`, each library only where it is used."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints_convert import convert_checkpoint
from polarjax.cli.main import VERBS

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "polarjax" / "assets" / "opt-6m"
HEAVY = {"jax", "flax", "optax", "orbax", "tensorstore", "transformers", "torch", "huggingface_hub", "scipy"}
FACES = ("polarjax", "polarjax.evaluation", "polarjax.sparsity")
RUN = """
import io, sys
from contextlib import redirect_stdout
from polarjax.cli.main import main
out = io.StringIO()
for words in {calls!r}:
    with redirect_stdout(out):
        try:
            main(words)
        except SystemExit as done:
            assert not done.code, done.code
"""


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "model"
    convert_checkpoint(MODEL, out)
    return out


def loaded_by(code: str) -> set[str]:
    """All modules in a new process after `code`."""
    code += "\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> set[str]:
    return HEAVY & {name.partition(".")[0] for name in modules}


def test_help_of_the_command_and_of_every_verb_imports_nothing_heavy():
    calls = [["--help"], ["--version"], *([*verb.split(), "--help"] for verb in VERBS)]
    assert heavy(loaded_by(RUN.format(calls=calls))) == set()


def test_inspect_imports_nothing_heavy(model_directory):
    calls = [["inspect", str(MODEL)], ["inspect", str(model_directory), "--memory", "24", "--json"]]
    assert heavy(loaded_by(RUN.format(calls=calls))) == set()


def test_importing_the_packages_imports_nothing_heavy():
    names = ("polarjax", "polarjax.costs", "polarjax.sparsity", "polarjax.evaluation", "checkpoints_convert")
    assert heavy(loaded_by(f"import {', '.join(names)}")) == set()


def test_a_decoder_is_there_without_what_only_disks_and_training_need():
    modules = loaded_by("import polarjax as pj; pj.Decoder, pj.generate, pj.stream, pj.TextStream")
    assert heavy(modules) <= {"jax", "flax", "scipy"} | heavy(loaded_by("import jax, flax.nnx"))


def test_text_and_files_need_no_torch(model_directory, tmp_path):
    """Nor do loading and decoding on a CPU need Mosaic."""
    code = f"""
import polarjax as pj
from checkpoints_convert import convert_checkpoint, export_checkpoint
convert_checkpoint({str(MODEL)!r}, {str(tmp_path / "model")!r})
export_checkpoint({str(tmp_path / "model")!r}, {str(tmp_path / "hf")!r})
bundle = pj.load({str(model_directory)!r})
tokens, lengths = bundle.tokenizer.encode(["a text"])
pj.generate(bundle.model, tokens, lengths, max_new_tokens=1)
"""
    modules = loaded_by(code)
    assert "torch" not in modules
    assert not {name for name in modules if name.startswith("jax.experimental.pallas")}


def test_a_tokenizer_leaves_transformers_and_torch_whole_and_reads_its_model_files_once(model_directory):
    """Modules of transformers that were imported without torch have the real one, and so has the program.

    transformers finds the same in its model files as without our help, which ends when the tokenizer is loaded.
    """
    code = f"""
import sys
read = []
sys.addaudithook(lambda event, args: event == "open" and read.append(str(args[0])))
from polarjax.text.tokenizer import Tokenizer
Tokenizer.load({str(model_directory / "tokenizer")!r}, model_type="opt")
assert sum(name.endswith("transformers/models/opt/modeling_opt.py") for name in read) == 1
from transformers import modeling_rope_utils as before
assert before.torch.arange(3).tolist() == [0, 1, 2]
import torch
from torch import nn
assert before.torch is torch and nn.Linear(2, 3)
from transformers import models
from transformers.utils import import_utils
found = import_utils.define_import_structure(models.__file__)
import_utils.define_import_structure.cache_clear()
import_utils.create_import_structure_from_path.cache_clear()
assert found == import_utils.define_import_structure(models.__file__)
"""
    assert "torch" in loaded_by(code)


def test_torch_imported_before_stays_as_it_is(model_directory):
    code = f"""
import torch
from polarjax.text.tokenizer import Tokenizer
Tokenizer.load({str(model_directory / "tokenizer")!r}, model_type="opt")
import sys, transformers.modeling_rope_utils as module
assert sys.modules["torch"] is torch is module.torch
"""
    loaded_by(code)


@pytest.mark.parametrize("package", FACES)
def test_analyzers_see_the_names_where_they_are_found(package):
    """The block for static analysis and what is found at run time are the same objects."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    found = [(alias, node.module) for node in imports for alias in node.names]
    seen = {
        alias.name: home for alias, home in found if not alias.asname
    }  # `X as X` needs an extra: not in __all__
    assert sorted(seen) == sorted(module.__all__)
    for name, home in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(home)), name)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", FACES)
def test_missing_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        importlib.import_module(package).nothing  # noqa: B018
