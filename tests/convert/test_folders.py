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
from checkpoints_convert import convert_checkpoint, describe_checkpoint, export_checkpoint
from checkpoints_convert.hf_config import read_config
from checkpoints_convert.rules import make_plan
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
    "biases that config.json does not know": (
        lambda arrays: arrays.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}),
        "1 unknown: .*q_proj.bias. Hint: use the config.json of these weights",
    ),
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


def test_the_body_of_a_tied_model_may_be_a_classifier(plain, tmp_path):
    """Its language model looks alike; transformers would tie a head to the embeddings."""
    add = lambda arrays: arrays.update({"score.weight": np.zeros((2, 24), np.float32)})
    with refuses(pj.CheckpointError, "a classifier or a reward model"):
        convert_checkpoint(changed(plain("opt"), tmp_path / "hf", add), tmp_path / "out")


NOT_NEEDED = {
    "opt": ("v_head.summary.weight", "model.decoder.embed_positions._float_tensor", "value_head.bias"),
    "llama-gqa": (
        *("model.layers.0.self_attn._cos_cached", "model.layers.1.self_attn.masked_bias"),
        *("model.position_ids", "score.weight", "medusa_head.0.0.linear.weight", "v_head.summary.bias"),
    ),
}


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_what_a_language_model_does_not_need_is_left_out_with_a_note(plain, tmp_path, name):
    names = tuple(sorted(NOT_NEEDED[name]))
    add = lambda arrays: arrays.update({each: np.zeros((1, 24), np.int8) for each in names})
    found = convert_checkpoint(changed(plain(name), tmp_path / "hf", add), tmp_path / "out")
    assert found.notes == (f"left out, because the language model does not need it: {', '.join(names)}",)
    assert found.skipped == names
    assert same(found.path, convert_checkpoint(plain(name), tmp_path / "expected").path)


_FSDP = "_fsdp_wrapped_module."
WRAPPED = {
    "compiled": (lambda name: f"_orig_mod.{name}", "'_orig_mod.'"),
    "compiled by layer": (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), "'_orig_mod.'"),
    "data parallel": (lambda name: f"module.{name}", "'module.'"),
    "both": (lambda name: f"module._orig_mod.{name}", "'_orig_mod.' and 'module.'"),
    "twice": (lambda name: f"module.module._orig_mod.module.{name}", "'_orig_mod.' and 'module.'"),
    "DeepSpeed": (lambda name: f"_forward_module.model.{name}", "'_forward_module.' and 'model.'"),
    "FSDP by layer": (
        lambda name: _FSDP + name.replace("layers.1.", f"layers.1.{_FSDP}_checkpoint_wrapped_module."),
        f"'{_FSDP}' and '_checkpoint_wrapped_module.'",
    ),
    "policy": (lambda name: f"module.policy._orig_mod.{name}", "'_orig_mod.' and 'module.' and 'policy.'"),
    "transformer": (lambda name: name.replace("model.", "transformer.", 1), "'transformer.'"),
    "model in a model": (lambda name: f"model.{name}", "'model.'"),
    "model in a model in a model": (lambda name: f"model.model.{name}", "'model.model.'"),
    "only the body": (lambda name: name.replace("model.", "model.model.", 1), "'model.'"),
}


@pytest.mark.parametrize(
    "beside", [(), ("value_model.model.norm.weight", "value_model.score.weight")], ids=len
)
@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("name", ["llama-gqa", "opt"])
def test_wrappers_are_named_and_the_hint_removes_all_of_them(plain, name, kind, beside):
    """The hint's own expression is run; another model beside the policy is left out by it."""
    if beside and (name, kind) != ("llama-gqa", "policy"):
        return
    wrap, words = WRAPPED[kind]
    family, config, *_ = read_config(plain(name))
    shapes = {key: each.shape for key, each in open_weights(plain(name)).items()}
    wrapped = {wrap(key): shape for key, shape in shapes.items()} | dict.fromkeys(beside, (24,))
    with pytest.raises(pj.CheckpointError) as error:
        make_plan(family, config, wrapped, where="HERE")
    assert f"names contain {words}, which a wrapper added" in str(error.value)
    renamed = eval(str(error.value).partition("rename its tensors: ")[2], {"state_dict": wrapped})
    assert len(make_plan(family, config, renamed, where="HERE").steps) == len(shapes)


def _named_weights(source: Path, folder: Path, value: str) -> Path:
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_weights": value}))
    return folder


@pytest.mark.parametrize("value", ["other.safetensors", "other.safetensors.index.json"])
def test_config_json_may_name_the_file_of_the_weights(plain, tmp_path, value):
    """As in transformers, which is asked here too; an export has the usual files and not the key."""
    source = _named_weights(plain("llama-gqa"), tmp_path / "hf", value)
    arrays = load_file(source / SINGLE)
    arrays["model.norm.weight"][:] = 2
    save_file(arrays, source / "other.safetensors", {"format": "pt"})
    places = dict.fromkeys(arrays, "other.safetensors")
    (source / "other.safetensors.index.json").write_text(json.dumps({"weight_map": places, "metadata": {}}))
    theirs = hf_models.transformers.AutoModelForCausalLM.from_pretrained(source)
    assert (theirs.model.norm.weight == 2).all()
    assert describe_checkpoint(source).files == ("other.safetensors",)
    found = convert_checkpoint(source, tmp_path / "out")
    assert (parameters(pj.load(found.path).model)["final_norm.scale"][...] == 2).all()
    assert found.notes == (f"the weights of {value} are read, as in transformers; not read: {SINGLE}",)
    export_checkpoint(found.path, tmp_path / "back")
    assert same(convert_checkpoint(tmp_path / "back", tmp_path / "again").path, found.path)
    for file in source.glob("other.*"):
        file.unlink()
    with refuses(pj.CheckpointError, f"{value}: a weights file is missing"):
        convert_checkpoint(source, tmp_path / "out")


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
