"""Model directories back into HuggingFace folders: the same bits, read by transformers, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import polarjax as pj
from checkpoints_convert import config_from_hf, convert_checkpoint, export_checkpoint
from checkpoints_convert.export import hf_config, written_config
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.weights_io import INDEX, SINGLE
from polarjax.checkpoint.reader import ModelReader
from polarjax.storage.atomic import absolute
from tests.convert import hf_models
from tests.convert.test_convert_cli import run
from tests.model import zoo
from tests.one_line import refuses

NAMES = (
    "opt", "opt-untied", "opt-no-bias", "opt-no-final-norm", "opt-350m", "llama-biases", "llama3-gqa-tied",
    "llama-relu-mqa", "prosparse", "llama-linear-rope", "mistral-gqa", "mistral-no-window", "qwen2-window",
    "qwen3-window",
)  # fmt: skip
TOKENS = torch.arange(3, 23)[None]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


def round_trip(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options) -> torch.nn.Module:
    theirs = hf_models.save(name, folder / "hf", dtype=dtype)
    convert_checkpoint(folder / "hf", folder / "model")
    export_checkpoint(folder / "model", folder / "back", **options)
    return theirs


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    """The tensors have the source's bits, config.json says the same, and transformers computes the same."""
    theirs = round_trip(name, tmp_path)
    before, after = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.shape, tensor.dtype) == (after[key].shape, after[key].dtype)
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    sources = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("hf", "back")]
    assert sources[0] == sources[1]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_round_trip_in_shards(tmp_path, dtype):
    round_trip("llama-gqa", tmp_path, dtype=dtype, shard_bytes=8000)
    before, after = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back")
    assert {key: tensor.dtype for key, tensor in before.items()} == dict.fromkeys(after, dtype)
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in before.values())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert convert_checkpoint(tmp_path / "back", tmp_path / "again").tensors == len(before)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_written_config_reads_back_the_same(name):
    written = hf_models.make(name).config.to_dict()
    config = config_from_hf(written)
    data = written_config(FAMILIES[written["model_type"]], config)
    assert data is not None
    assert config_from_hf(data) == config
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(data)))
    assert config_from_hf(theirs.to_dict()) == config
    assert hf_models.named(data["architectures"][0])


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("llama-gqa", "llama"),
        ("fatrelu-gated", "sparsellama"),
        ("qk-norm", "qwen3"),
        ("window", "ministral"),
    ],
)
def test_a_model_that_was_saved_finds_its_family(tmp_path, name, model_type):
    """Without the source's config.json and without a model_type."""
    model = zoo.model(name)
    pj.save(tmp_path / "model", pj.Bundle(model))
    assert export_checkpoint(tmp_path / "model", tmp_path / "hf").model_type == model_type
    again = convert_checkpoint(tmp_path / "hf", tmp_path / "again")
    assert again.config == model.config
    ours = zoo.parameters(pj.load(again.path).model)
    for key, array in zoo.parameters(model).items():
        np.testing.assert_array_equal(ours[key], array)


def test_a_model_that_no_family_says(tmp_path):
    opt = zoo.model("opt")  # whose norms have another epsilon than the family's
    other = zoo.with_parameters(zoo.dataclasses.replace(opt.config, norm_eps=1e-3), zoo.parameters(opt))
    pj.save(tmp_path / "model", pj.Bundle(other))
    with refuses(
        pj.UnsupportedConfigError, "no transformers family can express this configuration.*opt or llama"
    ):
        export_checkpoint(tmp_path / "model", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    hf_models.save("llama-gqa", folder / "hf")
    assets = absolute(__file__).parents[2] / "polarjax" / "assets" / "llama-6m"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets / name, folder / "hf")
    return convert_checkpoint(folder / "hf", folder / "model").path


def test_fault_11_transposed_parameters_are_written_in_rows(model, tmp_path, monkeypatch):
    """An array in another memory order than its shape says is not written as it lies."""
    read = ModelReader.read
    monkeypatch.setattr(ModelReader, "read", lambda *arguments: np.asfortranarray(read(*arguments)))
    export_checkpoint(model, tmp_path / "hf")
    monkeypatch.undo()
    export_checkpoint(model, tmp_path / "plain")
    assert (tmp_path / "hf" / SINGLE).read_bytes() == (tmp_path / "plain" / SINGLE).read_bytes()


def test_fault_33_code_of_the_source_is_not_passed_on(tmp_path):
    hf_models.save("prosparse", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}))
    convert_checkpoint(tmp_path / "hf", tmp_path / "model")
    assert "auto_map" not in hf_config(ModelReader(tmp_path / "model"))[1]


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_every_spelling_of_the_dtype_is_that_of_the_tensors(tmp_path, keys):
    hf_models.save("opt", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    data = {key: value for key, value in json.loads(file.read_text()).items() if "dtype" not in key}
    file.write_text(json.dumps(data | dict.fromkeys(keys, "float32")))
    convert_checkpoint(tmp_path / "hf", tmp_path / "model", dtype="bfloat16")
    written = hf_config(ModelReader(tmp_path / "model"))[1]
    assert {key: written[key] for key in written if "dtype" in key} == dict.fromkeys(
        keys or ("torch_dtype",), "bfloat16"
    )


def test_a_copy_of_a_model_directory_is_exported_alike(model, tmp_path):
    pj.save(tmp_path / "copy", pj.load(model))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    export_checkpoint(tmp_path / "copy", ours)
    export_checkpoint(model, theirs)
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()


def test_the_tokenizer_goes_along(model, tmp_path):
    done = export_checkpoint(model, tmp_path / "hf")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(done.files)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")) > 0


def test_output_exists(model, tmp_path):
    export_checkpoint(model, tmp_path / "hf")
    with refuses(pj.CheckpointError, "already exists.*--overwrite"):
        export_checkpoint(model, tmp_path / "hf")
    export_checkpoint(model, tmp_path / "hf", overwrite=True, shard_bytes=9000)
    assert not (tmp_path / "hf" / SINGLE).exists()
    (tmp_path / "hf" / "photo.jpg").write_text("")
    with refuses(pj.CheckpointError, "not written by polarjax"):
        export_checkpoint(model, tmp_path / "hf", overwrite=True)
    with refuses(pj.CheckpointError, "contain one another"):
        export_checkpoint(model, model / "hf")


def test_a_damaged_parameter_is_found(model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    largest = max((copy / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with refuses(pj.CheckpointError, "files have changed"):
        export_checkpoint(copy, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_parameter_is_held_at_a_time(model, tmp_path, monkeypatch):
    read, held = ModelReader.read, []

    def watch(*arguments):
        array = np.array(read(*arguments))
        assert sum(each() is not None for each in held) <= 1
        held.append(weakref.ref(array))
        return array

    monkeypatch.setattr(ModelReader, "read", watch)
    assert export_checkpoint(model, tmp_path / "hf").tensors == len(held)


@pytest.mark.parametrize("count", [0, 7])
def test_an_interruption_leaves_nothing(model, tmp_path, monkeypatch, count):
    left = iter(range(count))
    read = ModelReader.read

    def stop(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(ModelReader, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(model, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_torch_is_not_needed(model, tmp_path):
    code = """if True:
        import sys
        sys.modules["torch"] = sys.modules["transformers"] = None
        from checkpoints_convert import export_checkpoint
        export_checkpoint(*sys.argv[1:])
    """
    command = [sys.executable, "-c", code, model, tmp_path / "hf"]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_the_verb(model, tmp_path, capsys):
    code, out, err = run(capsys, "export", model, tmp_path / "hf")
    assert code == 0
    assert out.startswith("llama: 30 tensors, ")
    assert "exporting: 1/1 MB" in err
    code, out, err = run(capsys, "export", model, tmp_path / "other", "--shard-gb", "0")
    assert (code, out) == (2, "")
    assert err == "polarjax: shard_bytes: not a positive number of bytes; got 0. Hint: omit it for 5 GB\n"
