"""Healing lowers what skipping costs, goes on where it was interrupted, and stops at what it can't do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax import memory
from polarjax.memory import held_bytes, tree_bytes
from polarjax.model.parameters import parameters
from polarjax.model.stacked import StackedDecoder, hidden_states, stack_parameters
from polarjax.selection.routers import Routers
from polarjax.sparsity import TuneOptions, tune, tuning, tuning_checks, tuning_setup
from polarjax.sparsity.own_text import own_windows
from polarjax.sparsity.tuning_setup import setup, trained_names
from polarjax.sparsity.tuning_state import is_state
from tests.model import zoo

NAME = "llama-mha"
OPTIONS = TuneOptions(
    tokens=24 * 16 * 12,
    batch_size=16,
    warmup=2,
    learning_rate=1e-3,
    router_learning_rate=1e-2,
    densities=(0.5, 0.5),
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
    """An uninterrupted run of 24 steps, as (model, routers, report)."""
    return run(windows)


def run(windows, options=OPTIONS, **more):
    routers = with_means(zoo.routers(NAME))
    return tune(zoo.model(NAME), routers, [windows], 0, options=options, held_out=windows[:8], **more)


def test_masked_perplexity_falls_and_the_result_belongs_together(whole):
    model, routers, report = whole
    assert report.steps == 24 and report.tokens == OPTIONS.tokens
    assert report.after[2] < report.before[2]
    assert report.memory["total"] > 0
    bundle = pj.Bundle(model, routers=routers)
    assert bundle.weights == routers.weights
    assert not np.array_equal(routers.layers[0].w_group, zoo.routers(NAME).layers[0].w_group)
    assert routers.layers[0].w_in is zoo.routers(NAME).layers[0].w_in


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(whole, windows, tmp_path, monkeypatch):
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
    with pytest.raises(pj.CheckpointError, match="other settings"):
        run(windows, dataclasses.replace(OPTIONS, learning_rate=2e-3), folder=folder, resume=True)
    model, routers, report = run(windows, folder=folder, resume=True)
    assert report.steps == 24
    for name, value in parameters(whole[0]).items():
        np.testing.assert_array_equal(parameters(model)[name], value, err_msg=name)
    np.testing.assert_array_equal(routers.layers[1].mean, whole[1].layers[1].mean)


def test_a_diverging_run_says_where_and_keeps_the_last_good_state(windows, tmp_path):
    folder = tmp_path / "state"
    with pytest.raises(pj.SparsityError, match=r"step [2-9].*diverged"):
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
    ],
)
def test_unusable_options_are_refused(wrong, message):
    with pytest.raises(pj.InputError, match=message):
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
    for domains, message in (([], "no text"), ([windows, windows[:, :6]], "differ in length")):
        with pytest.raises(pj.InputError, match=message):
            tune(model, routers, domains, key, options=OPTIONS)
    with pytest.raises(pj.SparsityError, match="Routers"):
        tune(model, None, [windows], key, options=OPTIONS)
    with pytest.raises(pj.InputError, match="shares"):
        tune(model, routers, [windows], key, options=OPTIONS, shares=[-1.0])


@pytest.mark.parametrize("train", ["routers", "out", "all"])
def test_memory_is_planned_before_anything_is_made(train):
    """What the plan counts as made is what the process then holds more; what the model already has isn't made again."""
    options = dataclasses.replace(OPTIONS, train=train)
    plan = setup(zoo.model(NAME), with_means(zoo.routers(NAME)), options, 12, 1)
    assert plan.memory["held before"] == (before := held_bytes())
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
    needed = setup(zoo.model(NAME), with_means(zoo.routers(NAME)), OPTIONS, 12, 1).memory["total"]
    monkeypatch.setattr(memory, "device_memory", lambda: int(needed * share))
    monkeypatch.setattr(tuning_setup, "device_memory", lambda: int(needed * share))
    monkeypatch.setattr(tuning_checks, "device_memory", lambda: int(needed * share))
    monkeypatch.setattr(tuning_setup.Setup, "arrays", None)
    if "XLA" not in hint:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    with pytest.raises(pj.InputError, match=rf"does not fit the device's memory.*{hint}"):
        run(windows)
