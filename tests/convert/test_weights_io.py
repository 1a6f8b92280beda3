"""Finding tensors on disk: damaged, missing and hostile files are refused by name."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import polarjax as pj
from checkpoints_convert import weights_io
from checkpoints_convert.read_ahead import RANGE_BYTES
from checkpoints_convert.weights_io import INDEX, SINGLE, open_weights, read_rows


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {"a.weight": make(3, 4), "b.weight": make(5), "c.weight": make(2, 2, 2)}


@pytest.fixture
def single(tmp_path, arrays):
    save_file(arrays, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path, arrays):
    for i, name in enumerate(arrays):
        save_file({name: arrays[name]}, tmp_path / shard(i))
    write_index(tmp_path, {name: shard(i) for i, name in enumerate(arrays)})
    return tmp_path


def shard(i: int) -> str:
    return f"model-0000{i}-of-00003.safetensors"


def write_index(folder, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def refused(folder, *words: str) -> None:
    with pytest.raises(pj.CheckpointError) as error:
        open_weights(folder)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_what_was_written(layout, arrays, request):
    tensors = open_weights(request.getfixturevalue(layout))
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])


@pytest.mark.parametrize("size", [1, 16, 40, RANGE_BYTES])
def test_rows_come_in_order_a_few_at_a_time(sharded, arrays, size, monkeypatch):
    monkeypatch.setattr(weights_io, "RANGE_BYTES", size)
    tensors = open_weights(sharded)
    rows = read_rows(list(tensors.values()))
    for name, tensor in tensors.items():
        expected = arrays[name].reshape(tensor.matrix)
        done = 0
        while done < len(expected):
            part = next(rows)
            assert len(part) == 1 or part.nbytes <= size
            np.testing.assert_array_equal(part, expected[done : done + len(part)])
            done += len(part)
        assert tensor.num_bytes == arrays[name].nbytes
    assert next(rows, None) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_are_exact(tmp_path, dtype):
    array = np.arange(1 << 12, dtype=np.uint16).view(np.float16).astype(dtype)
    save_file({"x": array}, tmp_path / SINGLE)
    read = open_weights(tmp_path)["x"].read()
    assert read.dtype == dtype
    assert read.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float64, ml_dtypes.float8_e4m3fn])
def test_other_dtypes_are_refused_when_they_are_needed(tmp_path, dtype):
    save_file({"x": np.zeros(4, dtype)}, tmp_path / SINGLE)
    with pytest.raises(pj.CheckpointError, match="unsupported dtype of x"):
        _ = open_weights(tmp_path)["x"].num_bytes


def test_no_weights(tmp_path):
    refused(tmp_path, "no weights", SINGLE, INDEX)


def test_shards_without_index(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, "no weights", shard(0), f"download {INDEX} too")


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_truncated(single, kept):
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[:kept])
    refused(single, SINGLE, "download")


def test_trailing_bytes(single):
    with open(single / SINGLE, "ab") as file:
        file.write(b"x")
    refused(single, SINGLE, "damaged")


def with_header(folder, header: bytes, body: bytes = b"") -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + body)


def entry(*offsets: int, shape=(2,)) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(12, 20)},
        {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(0, 8, shape=(3,))},
        {"a": entry(8, 0)},
        {"a": 1},
        {"a": {}},
    ],
    ids=["hole", "overlap", "shape", "order", "number", "empty"],
)
def test_invalid_headers(tmp_path, header):
    with_header(tmp_path, json.dumps(header).encode(), bytes(20))
    refused(tmp_path, SINGLE, "damaged")


def test_doubled_key_in_a_header(tmp_path):
    one = json.dumps(entry(0, 8))
    with_header(tmp_path, f'{{"a": {one}, "a": {one}}}'.encode(), bytes(8))
    refused(tmp_path, SINGLE, "'a' occurs twice")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>log in</body></html>", "web page"),
        (b"", "empty"),
    ],
    ids=["lfs", "html", "empty"],
)
def test_what_is_not_weights_at_all(single, content, words):
    (single / SINGLE).write_bytes(content)
    refused(single, SINGLE, words)


def test_folder_instead_of_file(tmp_path):
    (tmp_path / SINGLE).mkdir()
    refused(tmp_path, SINGLE, "folder where a weights file")


def test_missing_shard(sharded):
    (sharded / shard(1)).unlink()
    refused(sharded, "a shard is missing", shard(1))


def test_tensor_not_in_its_shard(sharded, arrays):
    write_index(sharded, {name: shard(max(i, 1)) for i, name in enumerate(arrays)})
    refused(sharded, "1 not in the shard that the index names: a.weight")


def test_tensor_in_two_shards(sharded, arrays):
    save_file({name: arrays[name] for name in ("a.weight", "b.weight")}, sharded / shard(1))
    refused(sharded, "1 in two shards: a.weight")


def test_tensor_not_in_the_index(sharded, arrays):
    save_file({"b.weight": arrays["b.weight"], "d.weight": arrays["b.weight"]}, sharded / shard(1))
    assert open_weights(sharded).keys() == {*arrays, "d.weight"}  # as transformers reads it


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", ".hidden", 3, None]
)
def test_index_out_of_the_folder(sharded, name):
    write_index(sharded, {"a.weight": name})
    refused(sharded, INDEX, "outside its folder")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_damaged_index(sharded, content):
    (sharded / INDEX).write_text(content)
    refused(sharded, INDEX)


def test_link_out_of_the_folder(sharded, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.safetensors"
    os.rename(sharded / shard(1), outside)
    (sharded / shard(1)).symlink_to(outside)
    refused(sharded, "links outside its folder", shard(1))


def test_links_of_a_hub_cache_are_followed(tmp_path, arrays):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(arrays, blobs / "123")
    (snapshot / SINGLE).symlink_to("../../blobs/123")
    assert open_weights(snapshot).keys() == arrays.keys()


def test_dangling_link(sharded):
    (sharded / shard(1)).unlink()
    (sharded / shard(1)).symlink_to("gone.safetensors")
    refused(sharded, shard(1), "missing")


def test_file_cut_after_it_was_opened(single):
    tensors = open_weights(single)
    with open(single / SINGLE, "r+b") as file:
        file.truncate(300)
    last = max(tensors.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(pj.CheckpointError, match="ends within"):
        last.read()
    with pytest.raises(pj.CheckpointError, match="ends within"):
        list(read_rows([last]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(single, data):
    original = (single / SINGLE).read_bytes()
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, 300) | st.integers(0, len(original) - 1)) % len(original)
        mutated[position] = data.draw(st.integers(0, 255))
    (single / SINGLE).write_bytes(mutated)
    try:
        for tensor in open_weights(single).values():
            tensor.read()
    except pj.CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        (single / SINGLE).write_bytes(original)
