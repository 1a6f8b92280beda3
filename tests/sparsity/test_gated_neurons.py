"""Neurons of models without ReLU: learned where few of them carry the output, and left dense where they don't."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.cli import learning
from polarjax.evaluation import perplexity
from polarjax.model.parameters import parameters, with_parameters
from polarjax.sparsity import sparsify
from polarjax.sparsity.gated_neurons import gated_rank, router_share
from polarjax.sparsity.options import CalibrateOptions, NeuronOptions, RefineOptions, TrainOptions
from polarjax.sparsity.pipeline import learn_neurons
from tests.model import zoo
from tests.sparsity.test_sparsify import tiny_windows

NAME = "llama-mha"
FEW = 10  # neurons that carry nearly all of the planted model's output
OPTIONS = {
    "training": TrainOptions(max_epochs=1, group_batch=256),
    "refinement": RefineOptions(tokens=0),
    "calibration": CalibrateOptions(batch_sizes=(1, 2, 4), multiple=4, num_batches=48),
}
NEURONS = NeuronOptions(epochs=30, learning_rate=1e-2, batch=64)


def planted() -> pj.Decoder:
    """A model whose first `FEW` neurons of each layer have down rows that are 30 times as long as the others'.

    All embeddings have a part in common, from which a router, which has no bias, can tell that.
    """
    flat = parameters(zoo.model(NAME))
    longer = jnp.where(jnp.arange(zoo.CONFIGS[NAME].d_ff) < FEW, 1.0, 1 / 30)[:, None]
    scaled = {name: value * longer for name, value in flat.items() if name.endswith("w_down")}
    moved = {"embed.tokens": flat["embed.tokens"] + 1}
    return with_parameters(zoo.CONFIGS[NAME], flat | scaled | moved)


@pytest.fixture(scope="module")
def learned():
    """The planted model with its routers, plans and report."""
    model = planted()
    return model, *sparsify(model, tiny_windows(), jax.random.key(1), neurons=NEURONS, **OPTIONS)


def test_few_neurons_carry_the_output_and_are_what_is_kept(learned):
    model, routers, plans, report = learned
    kept = np.asarray(plans.neurons, float)
    assert kept.shape == (3, 2) and (kept <= 16).all() and (kept % 4 == 0).all()
    assert (np.diff(kept, axis=0) >= 0).all()
    assert (np.asarray(plans.recall) >= NEURONS.target_share).all()
    assert (np.abs(np.asarray(report.recall) - np.asarray(plans.recall)) < 0.1).all()
    assert all(router.w_in.shape == (24, gated_rank(model.config)) for router in routers.layers)
    bundle = pj.Bundle(model, routers=routers, plans=plans)
    windows, sparsity = tiny_windows(4), bundle.sparsity(2, head_density=1.0)
    dense = perplexity(model, windows, mode="decode", batch_size=2)
    sparse = perplexity(model, windows, sparsity=sparsity, mode="decode", batch_size=2)
    assert dense.nll != sparse.nll and abs(sparse.nll - dense.nll) < 0.1


def test_the_verb_says_where_neurons_are_skipped_and_that_it_seldom_pays(learned, capsys):
    plans = learned[2]
    learning.print_gated(plans, 0.9)
    learning.print_gated(dataclasses.replace(plans, neurons=((None, None),) * 3), 0.9)
    some, none = capsys.readouterr().out.splitlines()
    assert "at batch sizes up to 4" in some and "at no batch size" in none and "seldom pays" in none
    assert learning.neuron_options("relu", 0.9) is None
    assert learning.neuron_options("gated", 0.8) == NeuronOptions(target_share=0.8)
    with pytest.raises(pj.InputError, match=r"--neurons.*relu \| gated"):
        learning.neuron_options("silu", 0.9)


def test_where_every_neuron_counts_mlps_stay_dense_and_no_router_is_kept():
    model = zoo.model(NAME)
    strict = NeuronOptions(epochs=1, target_share=0.99)
    routers, plans, report = sparsify(model, tiny_windows(), jax.random.key(1), neurons=strict, **OPTIONS)
    assert plans.neurons == ((None, None),) * 3 and report.recall == ((1.0, 1.0),) * 3
    assert all(router.w_in is None for router in routers.layers)
    pj.Bundle(model, routers=routers, plans=plans).sparsity(1)


def test_new_weights_make_gated_mlps_dense_again(learned):
    _, routers, plans, _ = learned
    routers, plans = learn_neurons(zoo.model(NAME), routers, plans, tiny_windows(), jax.random.key(0))
    assert all(router.w_in is None for router in routers.layers) and not any(map(any, plans.neurons))
    assert plans.routers == routers.fingerprint


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(pj.SparsityError, match="a ReLU model"):
        sparsify(zoo.model("opt"), tiny_windows(), jax.random.key(0), neurons=NEURONS, **OPTIONS)
    large = OPTIONS | {"calibration": CalibrateOptions()}
    with pytest.raises(pj.InputError, match="too short to calibrate"):
        sparsify(zoo.model(NAME), tiny_windows(), jax.random.key(0), neurons=NEURONS, **large)
    for wrong in ({"target_share": 1.0}, {"learning_rate": 0}, {"epochs": 0}, {"rank": 0}):
        with pytest.raises(pj.InputError, match=next(iter(wrong))):
            NeuronOptions(**wrong)
    assert router_share(zoo.CONFIGS[NAME], 6) == 6 * 64 / (3 * 24 * 40)
