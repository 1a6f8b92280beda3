"""Folders as people have them: several sets of weights, tied models by either tensor, left-overs, adapters."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_model

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from checkpoints_convert.weights_io import (
    INDEX,
    SINGLE,
    TORCH_INDEX,
    TORCH_SINGLE,
    WEIGHTS,
    open_weights,
    unused_weights,
)
from polarjax.model.parameters import parameters
from tests.convert import hf_models
from tests.one_line import refuses

HEAD = "lm_head.weight"
TIED = (
    "opt",
    "opt-350m",
    "llama-mha-tied",
    "mistral-gqa-tied",
    "qwen2-mqa-tied",
    "qwen3-gqa-tied",
    "prosparse-tied",
)
_SHARD = {INDEX: "model-00001-of-00001.safetensors", TORCH_INDEX: "pytorch_model-00001-of-00001.bin"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """HuggingFace folders by name, written once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("hf") / name
            hf_models.save(name, made[name])
        return made[name]

    return folder


def changed(source: Path, folder: Path, change) -> Path:
    """A copy whose tensors `change` has changed."""
    shutil.copytree(source, folder)
    arrays = load_file(folder / SINGLE)
    arrays = change(arrays) or arrays
    save_file({name: np.ascontiguousarray(each) for name, each in arrays.items()}, folder / SINGLE)
    return folder


def same(one: Path, two: Path) -> bool:
    first, second = (parameters(pj.load(each).model) for each in (one, two))
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def write_weights(folder: Path, name: str, value: float) -> None:
    array = np.full((2, 3), value, np.float32)
    file = folder / _SHARD.get(name, name)
    if file.suffix == ".bin":
        torch.save({"a": torch.from_numpy(array)}, file)
    else:
        save_file({"a": array}, file)
    if name in _SHARD:
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"a": file.name}}))


@pytest.mark.parametrize("there", [each for each in product((0, 1), repeat=4) if any(each)], ids=str)
def test_of_several_weights_those_are_read_that_transformers_reads(tmp_path, there):
    order = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    names = [name for name, is_there in zip(order, there, strict=True) if is_there]
    for value, name in enumerate(names):
        write_weights(tmp_path, name, value)
    assert open_weights(tmp_path)["a"].read().max() == 0
    assert unused_weights(tmp_path) == (names[0], tuple(names[1:]))


def test_a_newer_model_in_the_folder_of_an_older_one(plain, tmp_path):
    """With the old shards still there, and without: the new file counts."""
    source = tmp_path / "hf"
    hf_models.save("llama-gqa", source, shards=True)
    old = {file.name: file.read_bytes() for file in source.iterdir()}
    shutil.rmtree(source)
    shutil.copytree(
        changed(plain("llama-gqa"), tmp_path / "new", lambda arrays: arrays[HEAD].fill(3)), source
    )
    expected = convert_checkpoint(tmp_path / "new", tmp_path / "expected").path
    (source / INDEX).write_bytes(old[INDEX])
    first = convert_checkpoint(source, tmp_path / "first")
    for name, data in old.items():
        if name.startswith("model-"):
            (source / name).write_bytes(data)
    second = convert_checkpoint(source, tmp_path / "second")
    assert same(first.path, expected) and same(second.path, expected)
    note = f"the weights of {SINGLE} are read, as in transformers; not read: {INDEX}"
    assert first.notes == second.notes == (note,)


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_may_keep_either_tensor(plain, tmp_path, name):
    source = plain(name)
    expected = convert_checkpoint(source, tmp_path / "expected").path
    (table,) = [key for key in load_file(source / SINGLE) if key.endswith("embed_tokens.weight")]

    def head_only(arrays):
        arrays[HEAD] = arrays.pop(table)

    def both(arrays):
        arrays[HEAD] = arrays[table].copy()

    for i, change in enumerate((head_only, both)):
        found = convert_checkpoint(changed(source, tmp_path / f"hf{i}", change), tmp_path / f"out{i}")
        assert found.config.tie_embeddings
        assert same(found.path, expected)


def test_save_model_of_safetensors(plain, tmp_path):
    """It drops one of two names of a tensor."""
    source = Path(shutil.copytree(plain("llama-mha-tied"), tmp_path / "hf"))
    save_model(hf_models.make("llama-mha-tied"), str(source / SINGLE))
    found = convert_checkpoint(source, tmp_path / "out").path
    assert same(found, convert_checkpoint(plain("llama-mha-tied"), tmp_path / "expected").path)


BUFFERS = ("cos_cached", "sin_cached", "inv_freq", "original_inv_freq", "cos_sin_cache")


@pytest.mark.parametrize(
    "place", ["model.layers.0.self_attn.rotary_emb.", "model.rotary_emb.", "rotary_emb."]
)
def test_rotary_buffers_are_skipped(plain, tmp_path, place):
    add = lambda arrays: arrays.update({place + name: np.zeros((1, 1, 4)) for name in BUFFERS})
    found = convert_checkpoint(changed(plain("llama-gqa"), tmp_path / "hf", add), tmp_path / "out")
    assert found.skipped == tuple(sorted(place + name for name in BUFFERS))


@pytest.mark.parametrize("listed", [True, False])
def test_an_index_may_disagree_with_its_shards_about_a_buffer(tmp_path, listed):
    hf_models.save("llama-gqa", tmp_path / "hf", shards=True)
    file = tmp_path / "hf" / INDEX
    index = json.loads(file.read_text())
    buffer, shard = "model.rotary_emb.inv_freq", next(iter(index["weight_map"].values()))
    if listed:
        index["weight_map"][buffer] = shard
        file.write_text(json.dumps(index))
    else:
        arrays = load_file(file.parent / shard)
        save_file({**arrays, buffer: np.ones(3, np.float32)}, file.parent / shard)
    assert convert_checkpoint(tmp_path / "hf", tmp_path / "out").skipped == (() if listed else (buffer,))


def _renamed(rename):
    return lambda arrays: {rename(name): each for name, each in arrays.items()}


def _lora(arrays):
    arrays["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((2, 24), np.float32)


def _peft(arrays):
    key = "model.layers.0.self_attn.q_proj"
    arrays[f"{key}.base_layer.weight"] = arrays.pop(f"{key}.weight")
    _lora(arrays)
    return {f"base_model.model.{name}": each for name, each in arrays.items()}


def _classifier(arrays):
    arrays["score.weight"] = arrays.pop(HEAD)[:2]


OTHERS = {
    "LoRA beside the weights": (_lora, "adapter .LoRA.*merge_and_unload"),
    "peft": (_peft, "adapter .LoRA.*merge_and_unload"),
    "classifier": (_classifier, "a classifier or a reward model"),
    "value head": (
        lambda arrays: arrays.update({"v_head.summary.weight": np.zeros((1, 24), np.float32)}),
        "a classifier or a reward model",
    ),
    "compiled": (_renamed(lambda name: f"_orig_mod.{name}"), "names contain '_orig_mod.'"),
    "compiled by layer": (
        _renamed(lambda name: name.replace("layers.0.", "layers.0._orig_mod.")),
        "names contain '_orig_mod.'",
    ),
    "data parallel": (_renamed(lambda name: f"module.{name}"), "names contain 'module.'"),
    "float64": (
        lambda arrays: {name: each.astype(np.float64) for name, each in arrays.items()},
        r"got F64.*model.float\(\).save_pretrained",
    ),
    "bytes": (
        lambda arrays: arrays.update({HEAD: np.zeros((61, 24), np.int8)}),
        "quantized checkpoints are unsupported",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_weights_are_called_by_name(plain, tmp_path, kind):
    change, words = OTHERS[kind]
    source = changed(plain("llama-gqa"), tmp_path / "hf", change)
    with refuses(pj.CheckpointError, words):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "words"),
    [("adapter_model.safetensors", "only an adapter's weights.*merge_and_unload"), ("m.gguf", "llama.cpp")],
)
def test_a_config_without_weights_of_its_own(plain, tmp_path, file, words):
    shutil.copy(plain("llama-gqa") / "config.json", tmp_path)
    (tmp_path / file).write_bytes(b"")
    with refuses(pj.CheckpointError, words):
        open_weights(tmp_path)
    assert not any((tmp_path / name).exists() for name in (*WEIGHTS, TORCH_SINGLE))
