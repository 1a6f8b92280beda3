"""The three stages in one go, by function and by command, on tiny models."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from polarjax.checkpoint.learned import write_routers
from polarjax.cli.main import main
from polarjax.model import mlp
from polarjax.model.parameters import abstract, fingerprint, parameters, with_parameters
from polarjax.selection.routers import init_routers
from polarjax.sparsity import collect, passes, sparsify
from polarjax.sparsity.budgets import allocate, measured_budgets
from polarjax.sparsity.collection import plan_recording
from polarjax.sparsity.options import CalibrateOptions, CollectOptions, RefineOptions, TrainOptions
from polarjax.text.corpus import standard_library_text
from polarjax.text.tokenizer import Tokenizer
from tests.convert import hf_models
from tests.model import zoo
from tests.one_line import refuses

ASSETS = Path(pj.__file__).parent / "assets"
FAST = TrainOptions(learning_rate=1e-2, neuron_batch=256, group_batch=256, max_epochs=2)
UNREFINED = RefineOptions(tokens=0)
SMALL = CalibrateOptions(batch_sizes=(1, 2, 4), multiple=4, num_batches=16)


def tiny_windows(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, zoo.VOCAB, (count, 12), np.int32)


@pytest.mark.parametrize("name", ["opt", "llama-gqa"])
def test_everything_fits_the_model_and_itself_and_comes_again_with_the_key(tmp_path, name):
    model, key = zoo.model(name, "bfloat16"), jax.random.key(1)
    keep = CollectOptions(folder=tmp_path / "acts")
    refinement = RefineOptions(tokens=2000 * (name == "opt"))
    call = {"head_density": 0.25, "training": FAST, "refinement": refinement, "calibration": SMALL}
    routers, plans, report = sparsify(model, tiny_windows(), key, collecting=keep, **call)
    routers.check(model.config)
    plans.check(model.config)
    assert {leaf.dtype for leaf in jax.tree.leaves(routers)} == {jnp.dtype("bfloat16")}
    assert plans.batch_sizes == SMALL.batch_sizes and plans.head_density == 0.25
    assert np.array(report.recall).shape == (3, 2)
    assert report.tokens == 480 and report.training.head_density == 0.25
    assert set(report.seconds) == {"collect", "train", "refine", "calibrate", "measure"}
    assert (report.refinement is None) == (name != "opt")
    assert json.loads(json.dumps(report.to_json()))["tokens"] == 480
    assert (tmp_path / "acts" / "meta.json").exists()
    again, same_plans, _ = sparsify(model, tiny_windows(), key, **call)
    assert same_plans == plans and again.weights == routers.weights
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(routers)))


def test_a_few_layers_at_a_time_make_a_whole(tmp_path, monkeypatch):
    """The disk takes one of two layers, so each is recorded, learned from and removed in its turn."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, windows = zoo.model("opt"), tiny_windows()
    most = plan_recording(model, windows.shape, CollectOptions()).num_bytes * 2 // 3
    call = {"training": FAST, "calibration": dataclasses.replace(SMALL, dense_attention="important")}
    call["refinement"] = RefineOptions(tokens=2048)
    sizes, key, original = [], jax.random.key(1), passes.record

    def watched(*arguments, **more):
        sizes.append([path.name for path in tmp_path.iterdir()])
        recorded = original(*arguments, **more)
        assert sum(file.stat().st_size for file in tmp_path.rglob("*.npy")) <= 1.1 * most
        return recorded

    whole, _, expected = sparsify(model, windows, key, **call)
    monkeypatch.setattr(passes, "record", watched)
    routers, plans, report = sparsify(model, windows, key, collecting=CollectOptions(max_bytes=most), **call)
    routers.check(model.config)
    plans.check(model.config)
    pj.Bundle(model, routers=routers, plans=plans)
    assert len(sizes) == 2 and list(tmp_path.iterdir()) == [] and report.num_bytes <= most
    assert (plans.weights, plans.routers) == (routers.weights, routers.fingerprint)
    assert report.attention_importance == pytest.approx(expected.attention_importance, rel=1e-4)
    assert plans.dense_layers == (int(np.argmax(report.attention_importance)),)
    assert np.array(report.recall).shape == (3, 2) and len(report.training.neurons.f1) == 2
    found, wanted = (np.array(each.training.groups.captured) for each in (report, expected))
    assert np.abs(found - wanted).max() < 0.05
    shapes = [[leaf.shape for leaf in jax.tree.leaves(each)] for each in (routers, whole)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("full", [True, False])
def test_a_full_or_missing_folder_for_temporary_files_is_named(tmp_path, monkeypatch, full):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if full else tmp_path / "none"))
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    got = (
        f"{tmp_path}.*cannot write here; got No space left"
        if full
        else "no temporary folder.*got No such file"
    )
    with refuses(pj.CheckpointError, rf"{got}.*TMPDIR.*\(--activations\)"):
        sparsify(zoo.model("opt"), tiny_windows(), jax.random.key(0), calibration=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_budgets_keep_as_many_groups_in_all_where_they_matter():
    """Layer 1's output projection is nearly zero, so that its groups can go."""
    model = zoo.model("opt")
    model = zoo.with_parameter(model, "layers.1.attn.wo", model.layers[1].attn.wo[...] * 1e-3)
    call = {"training": FAST, "refinement": UNREFINED, "calibration": SMALL, "budgets": "calibrated"}
    _, plans, _ = sparsify(model, tiny_windows(), jax.random.key(0), **call)
    assert plans == pj.PlanTable.from_json(json.loads(json.dumps(plans.to_json())))
    K = model.config.num_kv_heads
    assert [sum(row) for row in plans.budgets] == [K + kept for kept in range(1, K + 1)]
    assert plans.budgets[0] == (K, 1) and plans.for_batch(1, model.config, 1 / K).groups == (None, 1)
    dense = dataclasses.replace(plans, dense_layers=(1,))  # the budgets hold, whichever layer was dense
    assert dense.for_batch(1, model.config, 0.5).groups == plans.for_batch(1, model.config, 0.5).groups
    for wrong in (((1, 1),), ((0, 1),) * K, ((1, K + 1),) * K, ((1,),) * K, ((True, 1),) * K):
        with refuses(pj.SparsityError, "unusable budgets"):
            dataclasses.replace(plans, budgets=wrong)


def test_allocation_is_exact():
    costs = np.random.default_rng(0).uniform(size=(3, 4))
    for total, found in zip(range(3, 13), allocate(costs, list(range(3, 13))), strict=True):
        every = [c for c in itertools.product(range(1, 5), repeat=3) if sum(c) == total]
        assert found == min(every, key=lambda c: sum(costs[i, k - 1] for i, k in enumerate(c)))


def test_prosparse_from_its_checkpoint_to_sparse_tokens(tmp_path, monkeypatch):
    """Of 40 neurons 12 ever exceed the threshold: the plans find that out, and leaving the others out changes no token.

    The others do exceed 0, so that nothing may be skipped if the threshold is forgotten anywhere.
    """
    theirs = hf_models.make("prosparse")
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if name.endswith("mlp.gate_proj.weight"):
                value[6:-6] *= 0.02
        theirs.get_input_embeddings().weight[:, 0] = 4.0  # lets a router without bias have a threshold
    theirs.save_pretrained(tmp_path / "hf")
    model = pj.load(convert_checkpoint(tmp_path / "hf", tmp_path / "model").path).model
    training = dataclasses.replace(FAST, neuron_batch=64, max_epochs=8)
    routers, plans, _ = sparsify(
        model, tiny_windows(80), jax.random.key(1), head_density=1.0, training=training, calibration=SMALL
    )  # which leaves nothing to refine
    seen = []

    def watched(x, w_up, w_down, index, **options):
        seen.append((index.shape[0], options["w_gate"].shape, options["threshold"]))
        return original(x, w_up, w_down, index, **options)

    original = mlp.sparse_mlp
    monkeypatch.setattr(mlp, "sparse_mlp", watched)
    tokens = jnp.asarray(np.random.default_rng(2).integers(3, zoo.VOCAB, (4, 9), np.int32))
    lengths = jnp.array([9, 4, 7, 1])
    dense = pj.generate(model, tokens, lengths, max_new_tokens=33)
    assert not seen
    sparse = pj.generate(
        model,
        tokens,
        lengths,
        max_new_tokens=33,
        sparsity=pj.Sparsity(routers, plans.for_batch(4, model.config)),
    )
    assert {(12, (40, 24), 0.5), (16, (40, 24), 0.5)} >= set(seen) and len(seen) == 2
    np.testing.assert_array_equal(sparse.tokens, dense.tokens)
    assert len(set(np.asarray(dense.tokens).ravel().tolist())) > 4


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"head_density": 0.0}, "not a density"),
        ({"head_density": 1.5}, "not a density"),
        ({"collecting": CollectOptions(max_bytes=1000)}, "larger than allowed"),
        ({"collecting": CollectOptions(max_bytes="1 GB")}, "max_bytes: not a size"),
        ({"budgets": "most"}, "sparsify: no such budgets; got most, expected uniform"),
        ({"collecting": CollectOptions(fit="yes")}, "collect: fit: "),
        ({"collecting": CollectOptions(mean_outputs="no")}, "collect: mean_outputs: "),
        (
            {"calibration": CalibrateOptions()},
            r"too short to calibrate; got 48 validation tokens of 480, expected at least 512",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(monkeypatch, keywords, message):
    monkeypatch.setattr("polarjax.model.decoder.forward", None)
    with pytest.raises(pj.PolarjaxError, match=message):
        sparsify(zoo.model("opt"), tiny_windows(), jax.random.key(0), **keywords)


def test_text_to_validate_on_is_needed_before_any_work(monkeypatch, tmp_path):
    """Models without ReLU, which calibrate no neurons, need it for epochs and budgets."""
    model, none = zoo.model("llama-mha"), (0.0, 0.1)
    activations = collect(model, tiny_windows(), tmp_path / "acts", held_out=none)
    with refuses(pj.SparsityError, r"the activations hold no validation text.*--validation"):
        measured_budgets(model, zoo.routers("llama-mha"), activations, (0,))
    monkeypatch.setattr("polarjax.model.decoder.forward", None)
    with refuses(pj.InputError, r"held_out: no text is held out.*--validation"):
        sparsify(model, tiny_windows(), jax.random.key(0), collecting=CollectOptions(held_out=none))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model directory of a tiny OPT with a real tokenizer; the attention of layer 1 turns the most."""
    config = dataclasses.replace(zoo.CONFIGS["opt"], vocab_size=4096, max_positions=64)
    random = np.random.default_rng(0)
    draw = lambda leaf: 0.2 * random.normal(size=leaf.shape).astype(np.float32)
    flat = {name: draw(leaf) for name, leaf in parameters(abstract(config)).items()}
    model = with_parameters(config, flat | {"layers.1.attn.wo": 20 * flat["layers.1.attn.wo"]})
    folder = tmp_path_factory.mktemp("models") / "opt"
    pj.save(folder, pj.Bundle(model, Tokenizer.load(ASSETS / "opt-6m")))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(standard_library_text("calibration")[:120_000], encoding="utf-8")
    return file


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return exit_.value.code, *capsys.readouterr()


QUICK = ("--learning-rate", "0.01", "--batch", "256", "--epochs", "1")
REFINED = ("--refine-tokens", "2000")
SHORT = ("--window", "64", "--max-tokens", "4096")


def test_the_verbs_one_by_one(tiny, text, tmp_path, capsys):
    model, acts = tmp_path / "model", tmp_path / "acts"
    spread, most = ("--budgets", "calibrated"), ("--max-batch", "4")
    published = ("--published", *REFINED, *spread)
    shutil.copytree(tiny, model)
    code, out, _ = run(capsys, "collect", model, "--text", text, "--to", acts, *SHORT, "--published")
    assert code == 0 and "64 windows of 64 tokens; recording 1.0 MB of activations (4,096 tokens)" in out
    code, _, error = run(capsys, "calibrate", model, "--activations", acts)
    assert code == 2 and "the model has no routers yet" in error
    code, out, _ = run(capsys, "train-routers", model, "--activations", acts, *QUICK, *published, "--json")
    result = json.loads(out)
    assert code == 0 and result["train_tokens"] == 55 * 64 and result["refinement"]["tokens"] == 2048
    code, out, _ = run(capsys, "calibrate", model, "--activations", acts, *most, *spread)
    assert code == 0 and "batch     4:" in out
    step_by_step = pj.load(model)
    assert step_by_step.plans.batch_sizes == (1, 2, 4) and step_by_step.plans.budgets
    assert step_by_step.routers.importance == "norms"
    assert all(layer.mean is None for layer in step_by_step.routers.layers)
    run(capsys, "train-routers", model, "--activations", acts, *QUICK, "--refine-tokens", "0")
    assert pj.load(model).plans is None  # they were made for other routers
    code, _, _ = run(capsys, "sparsify", model, "--text", text, *SHORT, *QUICK, *published, *most)
    at_once = pj.load(model)
    assert code == 0 and at_once.plans == step_by_step.plans
    assert at_once.routers.fingerprint == step_by_step.routers.fingerprint


def test_tune_makes_a_whole_model_directory(text, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "healed"
    run(capsys, "convert", ASSETS / "llama-6m", model)
    wanted = ("tune", model, out, "--text", text, "--window", "64", "--batch", "2", "--tokens", "256")
    code, _, error = run(capsys, *wanted)
    assert code == 2 and f"the model has no routers yet. Hint: run polarjax sparsify {model}" in error
    source = pj.load(model)
    routers = init_routers(source.model.config, jax.random.key(0))
    write_routers(model, dataclasses.replace(routers, weights=fingerprint(source.model)))
    code, _, error = run(capsys, *wanted[:-2])
    assert code == 2 and "nothing says when to stop" in error and "--tokens" in error
    assert not list(tmp_path.glob("healed*"))
    options = ("--train", "out", "--learning-rate", "1e-3", "--own-text", "0.5")
    code, printed, _ = run(capsys, *wanted, *options)
    assert code == 0 and "2 steps, 256 tokens" in printed
    assert "The model writes 2 windows of 64 tokens first, for --own-text 0.5." in printed
    healed = pj.load(out)
    assert healed.tokenizer is not None and healed.routers is not None and not list(tmp_path.glob("*.tuning"))
    before, after = parameters(source.model), parameters(healed.model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"layers.{i}.attn.wo" for i in range(source.model.config.num_layers)}
    code, _, error = run(capsys, *wanted)
    assert code == 2 and "the output already exists" in error


def test_sparsify_in_one_go_and_what_it_refuses(tiny, text, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    before = sorted(path.name for path in model.rglob("*"))
    code, _, error = run(capsys, "sparsify", model, "--text", text, *SHORT, *QUICK)
    assert code == 2 and "too short to calibrate; got 384 validation tokens" in error
    code, _, error = run(capsys, "sparsify", model, "--text", text, *SHORT, *QUICK, "--max-gb", "0.0005")
    assert code == 2 and "got 0.000517 GB for 4,096 tokens of one layer, expected at most 0.0005 GB" in error
    code, _, error = run(capsys, "sparsify", model, "--text", text, *SHORT, "--head-density", "0")
    assert code == 2 and "head density: not a density" in error
    code, _, error = run(capsys, "sparsify", model, "--text", text, *SHORT, "--epochs", "0")
    assert code == 2 and "max_epochs is not usable" in error
    assert sorted(path.name for path in model.rglob("*")) == before
    wrong_choices = (
        ("--head-objective", "mse"),
        ("--dense-attention", "last"),
        ("--rank-by", "size"),
        ("--skipped", "ones"),
    )
    for wrong in wrong_choices:
        code, _, error = run(capsys, "sparsify", model, "--text", text, *SHORT, *wrong)
        assert code == 2 and f"got {wrong[1]}, expected" in error
    cases = (
        (REFINED, (None, 2), "contributions"),
        (("--published", "--skipped", "mean", "--dense-attention", "important"), (2, None), "norms"),
    )
    for options, groups, importance in cases:
        words = (*SHORT, *QUICK, "--max-batch", "2", "--json", *options)
        code, out, _ = run(capsys, "sparsify", model, "--text", text, *words)
        result = json.loads(out)
        assert code == 0 and result["tokens"] == 4096 and len(result["recall"]) == 2
        assert max(result["attention_importance"]) == result["attention_importance"][1]
        bundle = pj.load(model)
        assert bundle.plans == pj.PlanTable.from_json(result["plans"])
        assert bundle.sparsity(2).plan.groups == groups
        assert bundle.routers.importance == importance
        assert (result["refinement"] is None) == ("--published" in options)
        assert all(layer.mean is not None for layer in bundle.routers.layers)
    code, out, _ = run(capsys, "inspect", model)
    assert "routers and plans; heads are ranked by norms, skipped ones replaced by their mean outputs" in out


def test_activations_of_another_training_are_refused(tiny, tmp_path, capsys):
    bundle = pj.load(tiny)
    flat = parameters(bundle.model)
    other = with_parameters(bundle.model.config, flat | {"final_norm.bias": flat["final_norm.bias"] + 1})
    assert fingerprint(other) != fingerprint(bundle.model)
    tokens = np.random.default_rng(0).integers(0, 4096, (8, 16))
    collect(other, tokens, tmp_path / "acts")
    code, _, error = run(capsys, "train-routers", tiny, "--activations", tmp_path / "acts")
    assert code == 2 and "the activations are of another model; got weights" in error
    assert not (tiny / "routers").exists()
