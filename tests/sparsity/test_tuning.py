"""Healing lowers what skipping costs, goes on where it was interrupted, and stops at what it can't do."""

import contextlib
import dataclasses
import inspect
import resource
import shutil
import types
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax import memory
from polarjax.cli import tune as cli_tune
from polarjax.evaluation import perplexity
from polarjax.memory import held_bytes, tree_bytes
from polarjax.model.parameters import parameters
from polarjax.model.stacked import StackedDecoder, hidden_states, stack_parameters
from polarjax.progress import show_lines
from polarjax.selection.plans import uniform_groups
from polarjax.selection.routers import Routers
from polarjax.sparsity import TuneOptions, pipeline, sparsify, tune, tuning, tuning_checks, tuning_setup
from polarjax.sparsity.options import CalibrateOptions, RefineOptions, TrainOptions
from polarjax.sparsity.own_text import own_windows
from polarjax.sparsity.tuning_batches import Batches
from polarjax.sparsity.tuning_setup import setup, trained_names
from polarjax.sparsity.tuning_state import is_state
from tests.model import zoo
from tests.one_line import refuses
from tests.several_devices import printed
from tests.tolerances import assert_close

NAME = "llama-mha"
OPTIONS = TuneOptions(
    tokens=24 * 16 * 12,
    batch_size=16,
    warmup=2,
    learning_rate=1e-3,
    router_learning_rate=1e-2,
    densities=(0.5, 0.5),
    router_width=3,
)


def with_means(routers: Routers) -> Routers:
    config = zoo.CONFIGS[NAME]
    mean = jnp.zeros((config.num_kv_heads, config.d_model))
    layers = tuple(dataclasses.replace(layer, mean=mean) for layer in routers.layers)
    return Routers(layers, importance="contributions")


@pytest.fixture(scope="module")
def windows():
    """Text that the model wrote itself, on which it is as good as it can be."""
    return own_windows(zoo.model(NAME), 64, 12, jax.random.key(3), first=1, batch_size=32)


@pytest.fixture(scope="module")
def whole(windows, tmp_path_factory):
    """An uninterrupted run of 24 steps, as (model, routers, report); what it moves to the device is no mistake of the
    caller's."""
    bundle = start()
    with jax.transfer_guard("disallow"):
        return run(windows, bundle=bundle)


def start() -> pj.Bundle:
    return pj.Bundle(zoo.model(NAME), routers=with_means(zoo.routers(NAME)))


def run(windows, options=OPTIONS, bundle=None, **more):
    given = start() if bundle is None else bundle
    return tune(given.model, given.routers, [windows], 0, options=options, held_out=windows[:20], **more)


def test_masked_perplexity_falls_and_the_result_belongs_together(whole, windows):
    model, routers, report = whole
    every = perplexity(zoo.model(NAME), windows[:20], batch_size=20)  # not of whole batches alone
    assert report.before[4] == pytest.approx(every.perplexity, rel=1e-5)
    assert report.steps == 24 and report.tokens == OPTIONS.tokens
    assert report.after[2] < report.before[2]
    assert report.memory["total"] > 0
    bundle = pj.Bundle(model, routers=routers)
    assert bundle.weights == routers.weights
    assert not np.array_equal(routers.layers[0].w_group, zoo.routers(NAME).layers[0].w_group)
    assert routers.layers[0].w_in is zoo.routers(NAME).layers[0].w_in
    assert routers.layers[0].group_in.shape == (24, OPTIONS.router_width)
    assert np.any(routers.layers[0].group_out)


def test_routers_learn_from_what_their_choices_cost(windows):
    """Without a loss of their own, too: the cost alone must lower it."""
    options = dataclasses.replace(OPTIONS, train="routers", router_weight=0.0, tokens=2 * OPTIONS.tokens)
    first = start()
    zeros = tuple(
        dataclasses.replace(layer, w_group=jnp.zeros_like(layer.w_group), mean=None)
        for layer in first.routers.layers
    )
    bundle = pj.Bundle(first.model, routers=Routers(zeros, importance="contributions"))
    _, routers, report = run(windows, options, bundle)
    assert report.after[2] < 0.99 * report.before[2], report
    assert np.any(routers.layers[1].w_group)


def test_a_blend_lies_between_the_first_weights_and_the_trained_ones(whole, windows):
    model, routers, report = run(windows, dataclasses.replace(OPTIONS, blend=0.25))
    first, trained = parameters(zoo.model(NAME)), parameters(whole[0])
    for name, value in parameters(model).items():
        assert_close(value, 0.75 * first[name] + 0.25 * trained[name], "rounding")
    np.testing.assert_array_equal(routers.layers[1].w_group, whole[1].layers[1].w_group)
    assert report.after != whole[2].after and report.before == whole[2].before


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(whole, windows, tmp_path, monkeypatch, capsys):
    original, steps = tuning._Run._step, []

    def interrupted(self, done, fraction):
        if done == 7 and not steps:
            steps.append(done)
            raise KeyboardInterrupt
        return original(self, done, fraction)

    monkeypatch.setattr(tuning._Run, "_step", interrupted)
    folder = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        run(windows, folder=folder)
    assert is_state(folder)
    with monkeypatch.context() as before_the_work:
        before_the_work.setattr(tuning, "setup", None)
        with refuses(pj.CheckpointError, "learning_rate.*other settings"):
            run(windows, dataclasses.replace(OPTIONS, learning_rate=2e-3), folder=folder, resume=True)
        with refuses(pj.CheckpointError, "no interrupted tuning to resume"):
            run(windows, folder=tmp_path / "other", resume=True)
        with refuses(pj.InputError, "where to resume from"):
            run(windows, resume=True)
        other = shutil.copytree(folder, tmp_path / "damaged")
        (other / "tuning.json").write_text('{"format": 1, "settings": []}')
        with refuses(pj.CheckpointError, "the saved state is damaged"):
            run(windows, folder=other, resume=True)
    folder.rename(tmp_path / ".state.polarjax-tmp-0123.old")  # as if killed while it was replaced
    with show_lines():
        model, routers, report = run(windows, folder=str(folder), resume=True)
    assert report.steps == 24 and "tune: 4608/4608 tokens" in capsys.readouterr().err
    for name, value in parameters(whole[0]).items():
        np.testing.assert_array_equal(parameters(model)[name], value, err_msg=name)
    np.testing.assert_array_equal(routers.layers[1].mean, whole[1].layers[1].mean)


def test_a_diverging_run_says_where_and_keeps_the_last_good_state(windows, tmp_path):
    folder = tmp_path / "state"
    with pytest.raises(pj.SparsityError, match=r"step [2-9].*diverged.*start over \(--overwrite\)"):
        run(windows, dataclasses.replace(OPTIONS, learning_rate=1e30), folder=folder)
    assert is_state(folder)


@pytest.mark.parametrize(
    ("subset", "changed"),
    [("out", {"wo"}), ("bias", {"scale"}), ("routers", set()), ("attention", {"wq", "wk", "wv", "wo"})],
)
def test_a_subset_is_what_changes(subset, changed):
    names = ["embed.tokens", "final_norm.scale", "layers.mlp.w_up", "layers.mlp_norm.scale"]
    names += [f"layers.attn.{name}" for name in ("wq", "wk", "wv", "wo")]
    found = trained_names(names, subset)
    assert {name.rsplit(".", 1)[1] for name in found} == changed
    assert trained_names(names, "all") == names


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": None}, "when to stop"),
        ({"densities": (0.7, 0.3)}, "range of densities"),
        ({"train": "mlp"}, "part of a model"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"dense_share": 1.0}, "dense_share"),
        ({"minutes": float("nan")}, "minutes"),
        ({"batch_size": 0}, "batch_size"),
        ({"l1": -1.0}, "l1"),
        ({"blend": 0}, "blend"),
        ({"dtype": "int8"}, "unusable dtype"),
        ({"activation": "gelu"}, "not an activation"),
        ({"remat": "yes"}, "remat: not a bool"),
    ],
)
def test_unusable_options_are_refused(wrong, message):
    with refuses(pj.InputError, message):
        TuneOptions(**{"tokens": 100, **wrong})


def test_a_penalty_makes_the_neurons_of_a_relu_student_inactive(windows):
    options = dataclasses.replace(OPTIONS, activation="relu", l1=10.0)
    model, _, report = run(windows, options)
    assert model.config.activation == "relu"
    config = dataclasses.replace(zoo.CONFIGS[NAME], activation="relu")
    flat = stack_parameters(parameters(zoo.model(NAME)))
    before = hidden_states(StackedDecoder.of(config, flat), jnp.asarray(windows[:8]))[1].active
    assert len(report.neurons) == config.num_layers
    assert all(np.asarray(report.neurons) < 0.85 * np.asarray(before))
    with pytest.raises(pj.SparsityError, match="needs a ReLU"):
        run(windows, dataclasses.replace(options, activation=None))


def test_unusable_text_and_routers_are_refused(windows):
    model, routers = zoo.model(NAME), zoo.routers(NAME)
    key = jax.random.key(0)
    wrong = (
        ([], "no text"),
        ([windows, windows[:, :6]], "differ in length"),
        ([windows[:, :1]], "next token"),
    )
    for domains, message in wrong:
        with pytest.raises(pj.InputError, match=message):
            tune(model, routers, domains, key, options=OPTIONS)
    with pytest.raises(pj.SparsityError, match="Routers"):
        tune(model, None, [windows], key, options=OPTIONS)
    with pytest.raises(pj.InputError, match="shares"):
        tune(model, routers, [windows], key, options=OPTIONS, shares=[-1.0])
    for layers in ((99,), (-1,), (0.5,), None):
        with refuses(pj.SparsityError, "tune: dense_layers names layers that don't exist"):
            tune(model, routers, [windows], key, options=OPTIONS, dense_layers=layers)


@pytest.mark.parametrize("train", ["routers", "out", "all"])
def test_memory_is_planned_before_anything_is_made(train):
    """What the plan counts as made is what the process then holds more; what the model already has isn't made again."""
    options = dataclasses.replace(OPTIONS, train=train)
    plan = setup(zoo.model(NAME), with_means(zoo.routers(NAME)), options, 12, 1)
    assert plan.memory["already in use"] == (before := held_bytes())
    state, teacher = plan.arrays()
    assert held_bytes() - before == plan.made
    masters = 3 * tree_bytes(state.model)  # with Adam's two moments
    layers = [value for name, value in teacher.items() if name.startswith("layers.")]
    routers = 3 * tree_bytes(state.routers)
    assert plan.made == masters + tree_bytes(layers) + routers + 4 * 3  # and three counters
    assert plan.memory["total"] >= before + plan.made + tree_bytes(state.model)


@pytest.mark.parametrize(
    ("share", "hint"),
    [
        (0.95, "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        (0.9, "--batch 8 --accumulate 2"),
        (0.001, "use a device with more"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(windows, monkeypatch, share, hint):
    """The hint names settings that were planned too, and fit."""
    for module in (memory, tuning_setup):  # what other tests keep on the device would count, too
        monkeypatch.setattr(module, "held_bytes", lambda: 0)
    needed = setup(zoo.model(NAME), with_means(zoo.routers(NAME)), OPTIONS, 12, 1).memory["total"]
    for module, name in (
        (memory, "device_memory"),
        (tuning_setup, "memory_limit"),
        (tuning_checks, "memory_limit"),
    ):
        monkeypatch.setattr(module, name, lambda: int(needed * share))
    monkeypatch.setattr(tuning_setup.Setup, "arrays", None)
    if "XLA" not in hint:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    with pytest.raises(pj.InputError, match=rf"does not fit the device's memory.*{hint}"):
        run(windows)


@pytest.mark.parametrize("sizes", [{"batch_size": 10**9}, {"batch_size": 1, "accumulate": 10**20}])
def test_a_step_that_no_compiler_takes_is_refused(windows, sizes):
    with refuses(pj.InputError, "does not fit the device's memory; got at least .*(--batch)"):
        run(windows, dataclasses.replace(OPTIONS, **sizes))


@pytest.mark.parametrize("groups", [3, 8, 9, 12])
@pytest.mark.parametrize("density", [0.3, 1 / 3, 0.45, 0.56, 2 / 3, 1.0])
def test_tuning_trains_what_plans_keep(windows, groups, density):
    config = dataclasses.replace(zoo.CONFIGS[NAME], num_heads=groups, num_kv_heads=groups)
    options = dataclasses.replace(OPTIONS, densities=(density, density))
    batches = Batches([windows], (1.0,), config, options, (0,), 0)
    (planned,) = set(uniform_groups(config, density, dense_layers=()))
    assert batches.kept == (planned, planned)


def test_the_command_trains_the_default_range():
    """Numbers that were rounded for people to read would round down to other groups."""
    defaults = inspect.signature(cli_tune.tune).parameters
    assert (defaults["least"].default, defaults["most"].default) == TuneOptions(tokens=1).densities


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"minutes": 0.01}, 64),
        ({"minutes": 1}, 1600),
        ({"minutes": 60}, 8192),
        ({"tokens": 10_000}, 12),
        ({"tokens": 10_000, "minutes": 60}, 12),
        ({"tokens": 10**9, "minutes": 2}, 3200),
        ({"tokens": 10**9}, 8192),
    ],
)
def test_a_short_run_writes_little_of_its_own_text(limits, count):
    asked = types.SimpleNamespace(**{"tokens": None, "minutes": None, "own_text": 0.6} | limits)
    assert cli_tune.own_count(cast(Any, asked), 512) == count


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond a few bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_neurons_are_learned_again_for_the_batch_sizes_of_the_plans(monkeypatch):
    model, text = zoo.model("opt"), np.random.default_rng(0).integers(0, zoo.VOCAB, (40, 12), np.int32)
    config, asked = model.config, []
    plans = pj.PlanTable(
        num_layers=config.num_layers,
        num_neurons=config.d_ff,
        num_groups=config.num_kv_heads,
        batch_sizes=(1, 16),
        neurons=((8,) * config.num_layers, (16,) * config.num_layers),
        recall=((1.0,) * config.num_layers,) * 2,
    )
    with refuses(pj.InputError, "at least 512, the largest batch size. Hint: .*smaller --max-batch"):
        pipeline.check_neuron_text(config, text, model, None)
    pipeline.check_neuron_text(config, text, model, plans)
    monkeypatch.setattr(pipeline, "train_routers", lambda *_: (zoo.routers("opt"), None))
    monkeypatch.setattr(pipeline, "calibrate", lambda *_, options, **__: asked.append(options) or plans)
    pipeline.learn_neurons(model, zoo.routers("opt"), plans, text, jax.random.key(0))
    assert [options.batch_sizes for options in asked] == [plans.batch_sizes]


@pytest.mark.parametrize("saved", [True, False])
def test_a_disk_that_fills_up_leaves_the_last_state(windows, tmp_path, monkeypatch, saved):
    """It is full when the state of step 3, or the first one, is saved."""
    folder, original = tmp_path / "state", tuning.save_state

    def save(*arguments):
        if saved and not is_state(folder):
            return original(*arguments)
        with full_disk():
            return original(*arguments)

    monkeypatch.setattr(tuning, "save_state", save)
    options = dataclasses.replace(OPTIONS, tokens=4 * 16 * 12, save_minutes=1e-9)
    hint = "with --resume: the state after step 1 is kept" if saved else "nothing was saved before"
    with refuses(
        pj.CheckpointError, rf"state: cannot write here; got File too large. Hint: make room.*{hint}"
    ):
        run(windows, options, folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["state"] * saved
    if saved:
        monkeypatch.setattr(tuning, "save_state", original)
        assert run(windows, options, folder=folder, resume=True)[2].steps == 4


def test_a_disk_that_is_full_at_the_end_costs_nothing(windows, tmp_path, capsys):
    options = dataclasses.replace(OPTIONS, tokens=2 * 16 * 12)
    with show_lines(), full_disk():
        assert run(windows, options, folder=tmp_path / "state")[2].steps == 2
    assert "the state after the last step is not saved: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def after_one_step(windows, options, devices: int):
    """The gradients' moments and the parts of the loss; how much memory the step needs."""
    routers, config = with_means(zoo.routers(NAME)), zoo.CONFIGS[NAME]
    plan = setup(zoo.model(NAME), routers, options, 12, devices)
    at, batch = plan.placement, Batches([windows], (1.0,), config, options, (0,), 0).of(0)
    given = jax.device_put((*batch, np.zeros(3, np.float32)), (at.rows(1), at.rows(2), at.whole))
    state, parts = plan.compiled(*plan.arrays(), *given)
    return (state.moments, parts), plan.memory["temporaries"]


def on_four_devices() -> None:
    """Runs in a process with four devices: one and four of them do the same, and the result lies where the model lay."""
    windows = np.random.default_rng(0).integers(0, zoo.VOCAB, (16, 12), np.int32)
    options = dataclasses.replace(OPTIONS, tokens=2 * 8 * 12, batch_size=8, accumulate=2)
    (many, less), (one, more) = (after_one_step(windows, options, count) for count in (4, 1))
    assert less < more  # a device has a part of the batch
    for got, wanted in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        assert len(got.devices()) == 4
        assert_close(got, wanted, "rounding")
    model, routers, report = run(windows, options)
    for value in jax.tree.leaves((model, routers)):
        assert value.devices() == {jax.devices()[0]}
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    spread = pj.shard(start(), mesh, rules={"vocab": None})
    shape = pj.shard(pj.Bundle(model, routers=routers), mesh, rules={"vocab": None})
    quick = {"training": TrainOptions(max_epochs=1), "refinement": RefineOptions(tokens=0)}
    quick["calibration"] = CalibrateOptions(batch_sizes=(1,), num_batches=2)
    learn = lambda: sparsify(spread.model, windows, jax.random.key(0), **quick)[1]
    plans = learn()
    with jax.set_mesh(mesh):  # of explicit axes
        assert learn() == plans
        model, routers, other = run(windows, options, spread, devices=1)
    assert_close(list(report.before.values()), list(other.before.values()), "rounding")
    places = lambda *trees: [leaf.sharding for leaf in jax.tree.leaves(trees)]
    assert places(model, routers) == places(shape.model, shape.routers)
    assert model.layout == spread.model.layout
    for devices, message in ((3, "8 windows, 3 devices. Hint: .*multiple of 3"), (5, "expected at most 4")):
        with refuses(pj.InputError, message):
            run(windows, options, devices=devices)
    assert tuning_checks.check_devices(None, dataclasses.replace(options, batch_size=6)) == 3


def test_several_devices_share_a_batch():
    printed("from tests.sparsity import test_tuning; test_tuning.on_four_devices()", 4)
