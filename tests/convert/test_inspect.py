"""`polarjax inspect` and `polarjax convert --dry-run`: what they tell, and that nothing is written."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

import polarjax as pj
from checkpoints_convert import convert_checkpoint, describe_checkpoint
from polarjax import costs
from polarjax.cli.inspect import supported
from polarjax.model.mesh_shape import MeshShape
from polarjax.model.parameters import parameters
from tests.convert import hf_models
from tests.convert.test_convert_cli import run
from tests.convert.test_hub import Hub
from tests.convert.test_torch_files import save_bins

LLAMA_8B = pj.ModelConfig(
    vocab_size=128256,
    num_layers=32,
    d_model=4096,
    d_ff=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=131072,
    rope=pj.RopeConfig(theta=5e5),
)

ASSET = Path(pj.__file__).parent / "assets" / "opt-6m"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    hf_models.save("llama-relu-gqa", folder / "hf", dtype=torch.bfloat16, shards=True)
    convert_checkpoint(folder / "hf", folder / "model")
    return folder


def told(capsys, *words) -> dict:
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    return json.loads(out)


@pytest.mark.parametrize("name", ["hf", "model"])
def test_checkpoint_and_its_model_directory_inspect_alike(folders, capsys, name):
    result = told(capsys, "inspect", folders / name, "--memory", "0.001", "--cache-length", 10)
    model = pj.load(folders / "model").model
    arrays = parameters(model).values()
    assert result["model_type"] == "llama"
    assert pj.ModelConfig.from_json(result["config"]) == model.config
    assert result["parameters"] == sum(array.size for array in arrays)
    assert result["parameter_bytes"] == result["stored_bytes"] == sum(array.nbytes for array in arrays)
    assert result["dtype"] == "bfloat16"
    assert result["cache_bytes_per_token"] == 2 * 2 * 2 * 2 * 10
    each = 10 * result["cache_bytes_per_token"] + 4 * hf_models.VOCAB
    assert result["largest_batch"] == {"10": (1_000_000 - result["parameter_bytes"]) // each}
    assert result["supported"] == {"dense": True, "heads": False, "groups": True, "neurons": True}
    assert result["refused"] == []


def test_a_mesh(capsys):
    words, mesh = ("inspect", ASSET, "--memory", "0.01", "--cache-length", 10), ("--mesh", "data=3,model=2")
    alone, found = (told(capsys, *words, *more) for more in ([], [*mesh, "--bandwidth", 0.5]))
    config, shape = pj.ModelConfig.from_json(found["config"]), MeshShape(data=3, model=2)
    assert "mesh" not in alone and found["parameter_bytes"] == alone["parameter_bytes"]
    assert (found["mesh"]["devices"], found["mesh"]["attention"]) == (6, "groups")
    assert found["mesh"]["parameter_bytes_per_device"] == costs.weights_bytes(config, mesh=shape)
    batch = found["largest_batch"]["10"]
    assert batch == costs.largest_batch(config, memory=1e7, cache_length=10, mesh=shape) > 0
    floor = costs.step_floor(config, batch_size=batch, cache_length=10, mesh=shape, bandwidth=5e8)
    assert found["mesh"]["step_floor"]["10"] == {
        name: 1e3 * seconds for name, seconds in zip(("memory_ms", "exchange_ms"), floor, strict=True)
    }
    code, out, _ = run(capsys, *words, *mesh)
    assert code == 0 and "6 devices (data=3, model=2); attention by groups" in out
    for wrong, line in {
        ("--mesh", "model=3"): "8 KV heads (groups) can't be divided",
        ("--mesh", "x=2"): "--mesh: not a mesh",
        ("--attention", "sequences"): "--attention is for --mesh",
        ("--bandwidth", "0.5"): "--bandwidth is for --mesh",
    }.items():
        code, _, err = run(capsys, *words, *wrong)
        assert (code, err.count("\n")) == (2, 1) and line in err


def test_dtype_changes_the_sizes(folders, capsys):
    as_stored, wider = (
        told(capsys, "inspect", folders / "hf", *words) for words in ([], ["--dtype", "float32"])
    )
    assert wider["parameter_bytes"] == 2 * as_stored["parameter_bytes"]
    assert wider["cache_bytes_per_token"] == 2 * as_stored["cache_bytes_per_token"]


def test_people_read_a_table(folders, capsys):
    code, out, _ = run(capsys, "inspect", folders / "model")
    assert code == 0
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert rows["family"] == "llama"
    assert rows["shape"].startswith(
        "2 layers of width 24; 4 query and 2 KV heads of width 10; 40 neurons, gated"
    )
    assert rows["supported"] == "dense, groups, neurons"
    assert rows["learned"] == "nothing yet: polarjax sparsify"
    assert rows["refused"] == "nothing"
    assert "96" in rows["fits"]


def test_largest_batch_of_a_published_model():
    """Llama 3.1 8B in bfloat16: 16.06 GB of weights, 128 KiB of cache a token."""
    assert costs.weights_bytes(LLAMA_8B) == 2 * 8_030_261_248
    assert costs.cache_bytes_per_token(LLAMA_8B) == 131072
    assert costs.largest_batch(LLAMA_8B, memory=80e9, cache_length=4096) == 118
    assert costs.largest_batch(LLAMA_8B, memory=16e9, cache_length=1) == 0


@pytest.mark.parametrize(
    ("change", "possible"),
    [
        ({"num_kv_heads": 32}, {"dense", "heads"}),
        ({"num_kv_heads": 8}, {"dense", "groups"}),
        ({"num_kv_heads": 1}, {"dense"}),
        ({"activation": "relu"}, {"dense", "groups", "neurons"}),
    ],
)
def test_what_can_be_skipped(change, possible):
    config = pj.ModelConfig.from_json(LLAMA_8B.to_json() | change)
    assert {name for name, why in supported(config).items() if why is None} == possible


def test_what_is_refused_is_told_with_the_reason(folders, tmp_path, capsys):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"quantization_config": {"bits": 4}}))
    result = told(capsys, "inspect", tmp_path / "hf")
    assert "quantized checkpoints are unsupported" in result["refused"][0]
    assert "config" not in result
    file.write_text(json.dumps(plain | {"vocab_size": 64}))
    result = told(capsys, "inspect", tmp_path / "hf")
    assert result["model_type"] == "llama"
    assert "[61, 24] instead of [64, 24]" in result["refused"][0]


def test_dry_run_tells_the_same_and_writes_nothing(folders, tmp_path, capsys):
    inspected = told(capsys, "inspect", folders / "hf")
    assert told(capsys, "convert", folders / "hf", tmp_path / "out", "--dry-run") == inspected
    assert list(tmp_path.iterdir()) == []


def test_dry_run_fails_where_the_conversion_would(folders, tmp_path, capsys):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    next((tmp_path / "hf").glob("*-00002-*")).unlink()
    words = ("convert", tmp_path / "hf", tmp_path / "out")
    code, out, err = run(capsys, *words, "--dry-run")
    assert code == 2
    assert "refused     " in out
    assert run(capsys, *words) == (2, "", err)
    assert "a shard is missing" in err


def test_bin_files_are_described_too(tmp_path):
    save_bins(hf_models.make("opt"), tmp_path / "bins", shards=2)
    found = describe_checkpoint(tmp_path / "bins")
    assert (found.model_type, found.dtype, found.refused) == ("opt", "float32", ())
    assert len(found.files) == 2


def test_hub_inspect_fetches_only_config_json(folders, tmp_path, monkeypatch, capsys):
    hub = Hub(folders / "hf", tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    result = told(capsys, "inspect", "org/tiny")
    assert [patterns for _, patterns in hub.asked] == [["config.json"]]
    assert (result["model_type"], result["tensors"], result["refused"]) == ("llama", None, [])
    assert result["parameters"] > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--memory", "0"], "--memory: no memory"),
        (["--dtype", "int8"], "--dtype: unusable dtype"),
        (["--cache-length", "0"], "cache_length is not usable"),
    ],
)
def test_bad_options(folders, capsys, words, line):
    code, out, err = run(capsys, "inspect", folders / "hf", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert line in err


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing", "no such folder"), ("empty", "config.json is missing"), ("file", "a file, not a folder")],
)
def test_what_is_no_checkpoint(tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, "inspect", tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_weights_are_not_read(folders, tmp_path):
    """The last tensor's bytes may be anything: only headers count."""
    shutil.copytree(folders / "hf", tmp_path / "hf")
    file = next((tmp_path / "hf").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-8:] = np.full(4, np.nan, np.float16).tobytes()
    file.write_bytes(data)
    assert describe_checkpoint(tmp_path / "hf").refused == ()
