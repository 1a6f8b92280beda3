"""PyTorch's .bin files: read to the bit, and refused when they are damaged, hostile or of another kind."""

import collections
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from checkpoints_convert.weights_io import TORCH_INDEX, TORCH_SINGLE, open_weights
from polarjax.model.parameters import parameters
from tests.convert import hf_models
from tests.one_line import refuses


def refused(folder, pattern: str) -> None:
    with refuses(pj.CheckpointError, pattern):
        open_weights(folder)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_bins(model: torch.nn.Module, folder: Path, *, shards: int = 1) -> None:
    """Weights as older transformers wrote them: shared tensors under each of their names."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / TORCH_SINGLE)
        return
    places = {
        name: f"pytorch_model-{i % shards:05}-of-{shards:05}.bin" for i, name in enumerate(sorted(state))
    }
    for file in set(places.values()):
        part = {name: state[name].clone() for name in places if places[name] == file}
        torch.save(part, folder / file)
    (folder / TORCH_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize(
    ("name", "dtype", "shards"),
    [("opt", torch.float32, 1), ("opt", torch.float16, 3), ("llama-gqa", torch.bfloat16, 2)],
)
def test_the_same_model_as_from_safetensors(tmp_path, name, dtype, shards):
    hf_models.save(name, tmp_path / "safe", dtype=dtype)
    save_bins(hf_models.make(name, dtype), tmp_path / "bins", shards=shards)
    done = [convert_checkpoint(tmp_path / kind, tmp_path / f"{kind}-out") for kind in ("safe", "bins")]
    assert done[0].config == done[1].config
    safe, bins = (parameters(pj.load(each.path).model) for each in done)
    assert safe.keys() == bins.keys()
    for key, array in safe.items():
        assert array.dtype == bins[key].dtype
        assert np.asarray(array).tobytes() == np.asarray(bins[key]).tobytes()


def test_orders_views_and_shared_storages(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "turned": base.T,
        "same": base,
        "part": base[1:3, 2:5],
        "row": base[2],
        "repeated": torch.ones(1).expand(3),
        "one": torch.tensor(5.0),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "narrow": base.bfloat16().T,
    }
    torch.save(state, tmp_path / TORCH_SINGLE)
    tensors = open_weights(tmp_path)
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].shape == tuple(tensor.shape)
        assert tensors[name].read().tobytes() == bits(tensor.detach()), name


def test_without_torch_one_line_says_what_to_install(tmp_path):
    save_bins(hf_models.make("opt"), tmp_path / "hf")
    code = """if True:
        import sys
        sys.modules["torch"] = None
        from polarjax.cli.main import main
        main(["convert", *sys.argv[1:]])
    """
    command = [sys.executable, "-c", code, tmp_path / "hf", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "a .bin file needs PyTorch. Hint: pip install 'polarjax[torch]'" in done.stderr


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_fault_08_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, zipped):
    state = {"a": torch.ones(2), "b": Evil(tmp_path / "ran")}
    torch.save(state, tmp_path / TORCH_SINGLE, _use_new_zipfile_serialization=zipped)
    refused(
        tmp_path,
        r"could run code.*mkdir.*blocked\. Hint" if zipped else "damaged, or not a .bin file of PyTorch 1.6",
    )
    assert not (tmp_path / "ran").exists()


def test_fault_09_files_of_the_old_format_and_whole_modules(tmp_path):
    file = tmp_path / TORCH_SINGLE
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    refused(tmp_path, r"damaged, or not a \.bin file of PyTorch 1.6.*save it as safetensors")
    torch.save(torch.nn.Linear(2, 2), file)
    refused(tmp_path, "could run code.*Linear.*save it as safetensors")
    file.write_bytes(pickle.dumps({"a": [1.0]}))
    refused(tmp_path, r"damaged, or not a \.bin file of PyTorch 1.6")


@pytest.mark.parametrize(
    ("state", "pattern"),
    [
        ([torch.ones(2)], "not a dictionary of tensors; got list"),
        ({"model": {"a": torch.ones(2)}}, "not a dictionary of only tensors; got model"),
        ({"a": torch.ones(2), "step": 3}, "got step of other kinds"),
        ({3: torch.ones(2)}, "got 3 of other kinds"),
        ({"a": torch.ones(2, 2).to_sparse()}, "got a of other kinds"),
    ],
)
def test_other_contents(tmp_path, state, pattern):
    torch.save(state, tmp_path / TORCH_SINGLE)
    refused(tmp_path, pattern)


def test_fault_12_other_dtypes_are_refused_when_they_are_needed(tmp_path):
    torch.save({"x": torch.ones(2, dtype=torch.float8_e4m3fn)}, tmp_path / TORCH_SINGLE)
    with refuses(pj.CheckpointError, "unsupported dtype of x; got float8_e4m3fn"):
        open_weights(tmp_path)["x"].read()


@dataclasses.dataclass
class Crafted:
    """A tensor of float32 [4 3] as the pickle describes it, right or wrong."""

    key: str = "0"
    count: int = 12
    offset: int = 0
    size: tuple[int, ...] = (4, 3)
    stride: tuple[int, ...] = (3, 1)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            return "storage", torch.FloatStorage, obj.key, "cpu", obj.count
        return None


@dataclasses.dataclass
class _Storage:
    key: str
    count: int


class _Tensor:
    def __init__(self, crafted: Crafted):
        self.crafted = crafted

    def __reduce__(self):
        c = self.crafted
        storage = _Storage(c.key, c.count)
        arguments = (storage, c.offset, c.size, c.stride, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def craft(file: Path, tensors: dict[str, Crafted], *, compress: bool = False, **members: bytes) -> None:
    """A .bin file with the given tensors, whose only record holds 0 to 11, and with more members."""
    with open(file.with_suffix(".pkl"), "wb") as stream:
        _Pickler(stream, protocol=2).dump({name: _Tensor(each) for name, each in tensors.items()})
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.write(file.with_suffix(".pkl"), "archive/data.pkl")
        archive.writestr("archive/data/0", np.arange(12, dtype=np.float32).tobytes())
        archive.writestr("archive/version", "3\n")
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_crafted_file_is_read_when_it_is_right(tmp_path):
    craft(tmp_path / TORCH_SINGLE, {"x": Crafted(), "y": Crafted(offset=2, size=(3,), stride=(1,))})
    tensors = open_weights(tmp_path)
    np.testing.assert_array_equal(tensors["x"].read(), np.arange(12).reshape(4, 3))
    np.testing.assert_array_equal(tensors["y"].read(), [2, 3, 4])


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"size": (5, 3)}, "damaged"),
        ({"size": (1 << 40, 3)}, "damaged"),
        ({"offset": 1}, "damaged"),
        ({"offset": -1}, "damaged"),
        ({"stride": (-3, 1)}, "damaged"),
        ({"stride": (1000, 1)}, "damaged"),
        ({"count": 13, "size": (13,), "stride": (1,)}, "do not match"),
        ({"count": 4, "size": (4,), "stride": (1,)}, "do not match"),
        ({"count": 1 << 40}, "damaged|do not match"),
        ({"key": "1"}, "damaged"),
        ({"key": "../0"}, "damaged"),
    ],
    ids=str,
)
def test_fault_10_tensors_beyond_their_storage(tmp_path, change, pattern):
    craft(tmp_path / TORCH_SINGLE, {"x": dataclasses.replace(Crafted(), **change)})
    refused(tmp_path, pattern)


def test_fault_10_malformed_archives(tmp_path):
    file = tmp_path / TORCH_SINGLE
    craft(file, {"x": Crafted()}, **{"../evil": b"1"})
    refused(tmp_path, "members outside one folder")
    craft(file, {"x": Crafted()}, **{"/evil": b"1"})
    refused(tmp_path, "members outside one folder")
    craft(file, {"x": Crafted()}, **{"archive/data/1": bytes(48)})
    refused(
        tmp_path, "do not match the stored bytes; got 1 storages of 48 bytes, expected 2 records of 96 bytes"
    )
    craft(file, {"x": Crafted()}, compress=True, **{"archive/data/1": bytes(1 << 20)})
    refused(tmp_path, "compressed members")
    craft(file, {"x": Crafted()}, **{"archive/byteorder": b"big"})
    refused(tmp_path, "big-endian")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PK\x03\x04 and no more", "damaged"),
    ],
)
def test_fault_05_and_06_what_is_not_weights_at_all(tmp_path, content, pattern):
    (tmp_path / TORCH_SINGLE).write_bytes(content)
    refused(tmp_path, pattern)
    (tmp_path / TORCH_SINGLE).unlink()
    (tmp_path / TORCH_SINGLE).mkdir()
    refused(tmp_path, "folder where a weights file")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    torch.save({"a": torch.randn(3, 4), "b": torch.randn(5).half()}, folder / TORCH_SINGLE)
    return folder


@pytest.mark.parametrize("kept", [10, 100, 500, -1])
def test_fault_04_truncated(small, tmp_path, kept):
    (tmp_path / TORCH_SINGLE).write_bytes((small / TORCH_SINGLE).read_bytes()[:kept])
    refused(tmp_path, "damaged")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(small, tmp_path, data):
    original = (small / TORCH_SINGLE).read_bytes()
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / TORCH_SINGLE).write_bytes(mutated)
    try:
        for tensor in open_weights(tmp_path).values():
            tensor.read()
    except pj.CheckpointError as error:
        assert "\n" not in str(error)


def test_safetensors_are_preferred(small, tmp_path):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    hf_models.save("opt", tmp_path)
    assert "model.decoder.embed_tokens.weight" in open_weights(tmp_path)
