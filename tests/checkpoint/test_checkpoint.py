"""A model directory: what is saved comes back, what is damaged or foreign is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polarjax as pj
from polarjax.checkpoint.learned import write_plans, write_routers
from polarjax.checkpoint.loading import load_with_tokenizer
from polarjax.checkpoint.manifest import FORMAT, describe_routers
from polarjax.checkpoint.writer import new_model
from polarjax.model.parameters import parameters
from polarjax.selection.routers import Routers, init_routers
from polarjax.text.tokenizer import Tokenizer
from tests.cli.homes import random_model
from tests.model import zoo

ASSETS = Path(pj.__file__).parent / "assets"


def plans_for(config: pj.ModelConfig) -> pj.PlanTable:
    return pj.PlanTable(
        num_layers=config.num_layers,
        num_neurons=config.d_ff,
        num_groups=config.num_kv_heads,
        batch_sizes=(1, 8),
        neurons=((8, None), (16, None)),
        recall=((0.99, 1.0), (0.99, 1.0)),
        head_density=0.5,
    )


def bundle_of(name: str = "opt", dtype=jnp.float32, **parts) -> pj.Bundle:
    return pj.Bundle(zoo.model(name, jnp.dtype(dtype).name), model_type="opt", **parts)


def full_bundle() -> pj.Bundle:
    bundle = bundle_of()
    config = bundle.model.config
    routers = init_routers(config, jax.random.key(3), rank=4)
    return dataclasses.replace(bundle, routers=routers, plans=plans_for(config))


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


@pytest.fixture
def saved(tmp_path):
    pj.save(tmp_path / "model", full_bundle())
    return tmp_path / "model"


def refused(path: Path, *words: str, error: type[pj.PolarjaxError] = pj.CheckpointError) -> None:
    with pytest.raises(error) as caught:
        pj.load(path)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_parameters_come_back(tmp_path, name, dtype):
    bundle = bundle_of(name, dtype)
    pj.save(tmp_path / "model", bundle)
    loaded = pj.load(tmp_path / "model")
    assert loaded.model.config == bundle.model.config
    assert_same(loaded.model, bundle.model)
    assert (loaded.tokenizer, loaded.routers, loaded.plans) == (None, None, None)
    assert loaded.model_type == "opt"


def test_routers_and_plans_come_back(saved):
    bundle, loaded = full_bundle(), pj.load(saved)
    assert_same(loaded.routers, bundle.routers)
    assert loaded.plans == bundle.plans


def test_a_string_names_a_directory_with_its_tokenizer_too(saved):
    with pytest.raises(pj.CheckpointError, match="model/tokenizer: the model directory has no tokenizer"):
        load_with_tokenizer(str(saved))
    tokenizer = Tokenizer.load(ASSETS / "opt-6m")
    pj.save(saved.parent / "speaks", pj.Bundle(random_model(np.random.default_rng(0)), tokenizer))
    bundle, found = load_with_tokenizer(str(saved.parent / "speaks"))
    assert found is bundle.tokenizer and found.eos_id == tokenizer.eos_id


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_mean_outputs_and_importance_come_back(saved, dtype):
    """With the model in another dtype too: routers keep theirs, and still belong to it."""
    config = full_bundle().model.config
    layers = tuple(
        dataclasses.replace(layer, mean=jnp.full((config.num_kv_heads, config.d_model), 0.3))
        for layer in init_routers(config, jax.random.key(0), neurons=False, width=3).layers
    )
    routers = Routers(layers, importance="contributions")
    write_routers(saved, routers)
    expected = {"importance": "contributions", "mean_outputs": True, "router_width": 3}
    assert describe_routers(saved / "routers") == expected
    assert routers.fingerprint != init_routers(config, jax.random.key(0), neurons=False).fingerprint
    loaded = pj.load(saved, dtype=dtype)
    assert_same(loaded.routers, routers)
    assert loaded.routers.importance == "contributions"
    pj.save(saved.parent / "again", loaded)
    assert pj.load(saved.parent / "again").routers.importance == "contributions"


def test_routers_that_do_not_say_what_they_rank_rank_norms(saved):
    file = saved / "routers" / "manifest.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in data.items() if name != "importance"}))
    assert pj.load(saved).routers.importance == "norms"
    file.write_text(json.dumps(data | {"importance": "size"}))
    refused(saved, "manifest.json: no such measure of importance; got size, expected norms | contributions")


def test_routers_of_groups_alone_come_back(saved):
    config = full_bundle().model.config
    routers = init_routers(config, jax.random.key(0), neurons=False)
    write_routers(saved, routers)
    assert_same(pj.load(saved).routers, routers)


def test_dtype_can_be_chosen_when_loading(saved):
    loaded = pj.load(saved, dtype=jnp.bfloat16)
    exact = parameters(full_bundle().model)
    for name, array in parameters(loaded.model).items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, exact[name].astype(jnp.bfloat16))
    assert_same(loaded.routers, full_bundle().routers)


def test_tokenizer_comes_back(tmp_path):
    tokenizer = Tokenizer.load(ASSETS / "opt-6m")
    pj.save(tmp_path / "model", bundle_of(tokenizer=tokenizer))
    loaded = pj.load(tmp_path / "model").tokenizer
    assert loaded is not None
    texts = ["def f(x):", "Hello  world"]
    for ours, theirs in zip(loaded.encode(texts), tokenizer.encode(texts), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.stop_ids == tokenizer.stop_ids


def test_saving_a_loaded_bundle_again(saved, tmp_path):
    pj.save(tmp_path / "again", pj.load(saved))
    assert_same(pj.load(tmp_path / "again").model, full_bundle().model)


def test_saving_over_a_model(saved):
    with pytest.raises(pj.CheckpointError, match="already exists"):
        pj.save(saved, bundle_of("llama-gqa"))
    pj.save(saved, bundle_of("llama-gqa"), overwrite=True)
    assert pj.load(saved).model.config == zoo.CONFIGS["llama-gqa"]


def test_sparsity_of_a_bundle():
    bundle = full_bundle()
    sparsity = bundle.sparsity(3)
    assert sparsity.plan == pj.SparsityPlan((16, None), (None, 2))
    assert bundle.sparsity(1, head_density=0.25).plan == pj.SparsityPlan((8, None), (None, 1))
    assert bundle.sparsity(9).plan.neurons == (None, None)
    with pytest.raises(pj.SparsityError, match="density"):
        bundle.sparsity(1, head_density=0.0)


@pytest.mark.parametrize("missing", ["routers", "plans"])
def test_sparsity_needs_routers_and_plans(missing):
    bundle = dataclasses.replace(full_bundle(), **{missing: None})
    with pytest.raises(pj.SparsityError, match=f"the model has no {missing} yet.*polarjax sparsify"):
        bundle.sparsity(1)


def test_one_of_several_processes_cannot_save(tmp_path, monkeypatch):
    bundle = full_bundle()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(pj.InputError, match="save: only a process that runs alone can save; got 2"):
        pj.save(tmp_path / "new", bundle)
    assert not list(tmp_path.glob("*new*"))


def test_routers_and_plans_are_replaced(saved):
    config = full_bundle().model.config
    routers = init_routers(config, jax.random.key(9), rank=4)
    plans = dataclasses.replace(plans_for(config), head_density=0.75)
    write_routers(saved, routers)
    write_plans(saved, plans)
    loaded = pj.load(saved)
    assert_same(loaded.routers, routers)
    assert loaded.plans == plans
    assert sorted(path.name for path in saved.iterdir()) == sorted(
        ["config.json", "manifest.json", "params", "plans.json", "routers"]
    )


def test_failed_routers_leave_the_old_ones(saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    routers = init_routers(full_bundle().model.config, jax.random.key(9), rank=4)
    with monkeypatch.context() as patch:
        patch.setattr("polarjax.storage.atomic._flush", fail)
        with pytest.raises(pj.CheckpointError, match="No space left"):
            write_routers(saved, routers)
    found = pj.load(saved)
    assert_same(found.routers, full_bundle().routers)
    assert found.plans == full_bundle().plans is not None


def test_new_routers_take_the_plans_of_the_old_ones_with_them(saved):
    write_routers(saved, init_routers(full_bundle().model.config, jax.random.key(9), rank=4))
    assert pj.load(saved).plans is None


def test_plans_that_cannot_be_written_leave_the_old_ones(saved, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    plans = dataclasses.replace(plans_for(full_bundle().model.config), head_density=0.75)
    with monkeypatch.context() as patch:
        patch.setattr("polarjax.storage.atomic.os.fsync", fail)
        with pytest.raises(pj.CheckpointError, match="No space left"):
            write_plans(saved, plans)
    assert pj.load(saved).plans == full_bundle().plans
    assert not [path for path in saved.iterdir() if path.name.startswith(".")]


def other_model() -> pj.ModelConfig:
    return dataclasses.replace(zoo.CONFIGS["opt"], d_model=32)


def test_routers_of_another_model_are_not_written(saved):
    routers = init_routers(other_model(), jax.random.key(0), rank=4)
    with pytest.raises(pj.SparsityError) as error:
        write_routers(saved, routers)
    text = str(error.value)
    assert text.startswith(f"{saved / 'routers'}: the routers")
    assert "for another model; got" in text
    assert text.endswith("Hint: run polarjax sparsify again")


def test_routers_of_another_model_are_not_read(saved, tmp_path):
    other = dataclasses.replace(zoo.CONFIGS["opt"], num_layers=3)
    folder = tmp_path / "other"
    pj.save(folder, pj.Bundle(pj.Decoder(other, rngs=nnx.Rngs(0))))
    write_routers(folder, init_routers(other, jax.random.key(0), rank=4))
    shutil.rmtree(saved / "routers")
    shutil.copytree(folder / "routers", saved / "routers")
    refused(
        saved, f"{saved / 'routers'}: the routers are for another model", "3 layers", error=pj.SparsityError
    )


def test_plans_of_another_model(saved):
    plans = plans_for(dataclasses.replace(other_model(), d_ff=48))
    with pytest.raises(pj.SparsityError, match=r"another model.*sparsify again"):
        write_plans(saved, plans)
    (saved / "plans.json").write_text(json.dumps(plans.to_json()))
    refused(saved, "plans.json", "another model", error=pj.SparsityError)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"batch_sizes": 1}'])
def test_damaged_plans(saved, text):
    (saved / "plans.json").write_text(text)
    refused(saved, "calibrate", error=pj.PolarjaxError)


def test_plans_that_keep_more_than_there_is(saved):
    config = full_bundle().model.config
    plans = dataclasses.replace(plans_for(config), neurons=((8, None), (config.d_ff + 1, None)))
    (saved / "plans.json").write_text(json.dumps(plans.to_json()))
    refused(saved, "plans.json", "more neurons than there are", error=pj.SparsityError)


@pytest.mark.parametrize(
    "dtype", ["int8", "bogus", jnp.bool_, "float64", float, "float8_e4m3fn", jnp.float8_e5m2]
)
def test_parameters_have_a_dtype_that_a_decoder_computes_in(saved, dtype):
    with pytest.raises(
        pj.InputError, match=r"unusable dtype; got .*, expected float32 \| bfloat16 \| float16"
    ):
        pj.load(saved, dtype=dtype)


def damaged_records(record):
    """Records that no writer makes."""
    name, file = next(iter(record["arrays"])), next(iter(record["files"]))
    yield from ({}, [], None, {**record, "files": None}, {**record, "arrays": []})
    yield {**record, "arrays": {name: {"shape": [2]}}}
    for entry in ({"dtype": "float99"}, {"shape": ["2"]}, {"shape": 2}):
        yield {**record, "arrays": {**record["arrays"], name: record["arrays"][name] | entry}}
    for entry in ({"bytes": "2"}, {"sha256": 2}, []):
        yield {**record, "files": {**record["files"], file: entry and record["files"][file] | entry}}


@pytest.mark.parametrize(("file", "key"), [("manifest.json", "params"), ("routers/manifest.json", "arrays")])
def test_damaged_records(saved, file, key):
    manifest = json.loads((saved / file).read_text())
    for record in damaged_records(manifest[key]):
        (saved / file).write_text(json.dumps({**manifest, key: record}))
        refused(saved, f"{saved / file}: the record of the arrays is damaged", "Hint: ")


@pytest.mark.parametrize("dtype", [3, "int8", None, []])
def test_a_manifest_of_no_dtype(saved, dtype):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "dtype": dtype}))
    refused(saved, "wrong dtype in the manifest", "Hint: ")


def test_the_source_config_is_kept(tmp_path):
    source = {"model_type": "opt", "dropout": 0.1}
    pj.save(tmp_path / "model", dataclasses.replace(bundle_of(), source_config=source))
    loaded = pj.load(tmp_path / "model")
    assert loaded.source_config == source
    hash(loaded)


@pytest.mark.parametrize(
    "part", ["config.json", "manifest.json", "params", "routers/manifest.json", "routers/arrays"]
)
def test_missing_parts(saved, part):
    path = saved / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused(saved, str(saved), "missing", "Hint: ")


@pytest.mark.parametrize("folder", ["params", "routers/arrays"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_every_damaged_file_is_found(saved, folder, damage):
    for path in sorted((saved / folder).rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if not data:
            continue
        if damage == "flip":
            path.write_bytes(
                data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
            )
        elif damage == "cut":
            path.write_bytes(data[:-1])
        else:
            path.unlink()
        refused(saved, str(saved / folder), path.name)
        path.write_bytes(data)
    pj.load(saved)


@pytest.mark.parametrize("file", ["config.json", "manifest.json", "routers/manifest.json"])
def test_another_format_is_refused(saved, file):
    data = json.loads((saved / file).read_text())
    (saved / file).write_text(json.dumps(data | {"format": FORMAT + 1}))
    refused(saved, file, f"got format {FORMAT + 1}, expected format {FORMAT}", "update polarjax")


def test_the_earlier_format_is_read(saved):
    """Its large files have a SHA-256 as the small ones do; here, no file is large."""
    for file in ("config.json", "manifest.json", "routers/manifest.json"):
        data = json.loads((saved / file).read_text())
        (saved / file).write_text(json.dumps(data | {"format": 1}))
    assert_same(pj.load(saved).routers, full_bundle().routers)


@pytest.mark.parametrize("file", ["config.json", "manifest.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_damaged_json(saved, file, text):
    (saved / file).write_text(text)
    refused(saved, file, "Hint: ")


@pytest.mark.parametrize(
    ("change", "name"),
    [({"d_ff": 41}, "0.mlp.w_up"), ({"num_layers": 1}, "1.attn.bk"), ({"num_layers": 3}, "2.attn.bk")],
)
def test_config_of_another_model(saved, change, name):
    """Before anything is read, since what goes onto a mesh needs the configuration's shapes."""
    data = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(data | change))
    shutil.rmtree(saved / "params")
    for how in ({}, {"mesh": jax.make_mesh((1,), ("model",))}):
        with pytest.raises(pj.CheckpointError, match=f"for different models.*wrong shape.*layers.{name}"):
            pj.load(saved, **how)


@pytest.mark.parametrize(
    "name", ["layers.0.w_in", "layers.1.b_group", "more", "layers.0.more", "layers.3.mean"]
)
def test_routers_that_are_not_whole(saved, name):
    """An array is left out, or added."""
    file = saved / "routers" / "manifest.json"
    data = json.loads(file.read_text())
    if data["arrays"]["arrays"].pop(name, None) is None:
        data["arrays"]["arrays"][name] = {"shape": [2], "dtype": "float32"}
    file.write_text(json.dumps(data))
    refused(saved, f"{file}: the routers' list of arrays is damaged", "Hint: run polarjax sparsify again")


@pytest.mark.parametrize("part", ["plans.json", "routers"])
def test_an_optional_part_that_is_something_else(saved, part):
    """It isn't taken for absent: a model that was to skip would decode densely without a word."""
    path = saved / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(saved / "gone")
    refused(saved, part, "the file is missing")


def test_files_that_may_not_be_read(saved, monkeypatch):
    """Everything is there; to make it again, as damage is repaired, would not help."""

    def deny(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for method in ("is_dir", "read_text", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, deny)
            refused(saved, str(saved), "got Permission denied", "Hint: ask for permission")


def test_no_model_directory(tmp_path):
    refused(tmp_path / "nothing", "no such model directory")
    refused(tmp_path, "manifest.json is missing")
    refused(ASSETS / "opt-6m", "looks like a HuggingFace folder", "polarjax convert")


@pytest.mark.parametrize("fault", ["missing", "unknown", "twice", "shape"])
def test_writer_accounts_for_every_parameter(tmp_path, fault):
    model = zoo.model("opt")
    arrays = {name: np.asarray(array) for name, array in parameters(model).items()}
    with pytest.raises(pj.CheckpointError), new_model(tmp_path / "m", model.config) as writer:
        for name, array in list(arrays.items())[fault == "missing" :]:
            writer.add(name, array[:-1] if fault == "shape" else array)
        if fault in ("unknown", "twice"):
            writer.add("embed.tokens" if fault == "twice" else "embed.more", arrays["embed.tokens"])
    assert list(tmp_path.iterdir()) == []
