"""Router training: a planted problem that it must solve, one that it must not, and each layer by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.selection.routers import init_routers
from polarjax.selection.selectors import top_mask
from polarjax.sparsity import train_routers
from polarjax.sparsity.early_stopping import Best
from polarjax.sparsity.minibatches import Feed
from polarjax.sparsity.objectives import GroupTask, NeuronTask, count, loss, weights_of
from polarjax.sparsity.options import TrainOptions
from polarjax.sparsity.training import fit
from tests.sparsity import planted
from tests.tolerances import assert_close

QUICK = TrainOptions(learning_rate=2e-2, neuron_batch=64, group_batch=64, max_epochs=20)


def trained(activations, options=QUICK, **keywords):
    return train_routers(activations, activations.config, jax.random.key(0), options=options, **keywords)


def assert_solved(report):
    """Negatives count less than positives, so a solved problem still has some false alarms."""
    assert min(report.neurons.recall) > 0.98
    assert min(report.neurons.f1) > 0.9
    assert min(report.groups.selected) > 0.95


def stacked(activations, task, key=0):
    layers = [
        weights_of(task, layer) for layer in init_routers(activations.config, jax.random.key(key)).layers
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_planted_problem_is_solved(dtype):
    activations = planted.activations(dtype=dtype)
    routers, report = trained(activations)
    routers.check(activations.config)
    assert {leaf.dtype for leaf in jax.tree.leaves(routers)} == {jnp.dtype(dtype)}
    assert_solved(report)


@pytest.mark.parametrize("importance", ["norms", "contributions"])
def test_routers_hold_the_means_and_say_what_they_rank(importance):
    data = planted.activations(200, dtype="bfloat16")
    means = np.random.default_rng(0).normal(size=(3, 4, 12)).astype(np.float32)
    quick = dataclasses.replace(QUICK, max_epochs=1)
    for given in (None, means):
        routers, _ = trained(dataclasses.replace(data, importance=importance, means=given), quick)
        routers.check(data.config)
        assert routers.importance == importance
        for layer, router in enumerate(routers.layers):
            expected = None if given is None else jnp.asarray(given[layer], jnp.bfloat16)
            assert (router.mean is None) if expected is None else (router.mean == expected).all()


def test_what_is_reported_is_what_the_routers_do():
    activations = planted.activations(dtype="bfloat16")
    routers, report = trained(activations, dataclasses.replace(QUICK, max_epochs=2))
    rows = activations.rows("validation")
    for layer in range(activations.config.num_layers):
        x = jnp.asarray(activations.router_inputs(rows)[layer])
        said = np.asarray(routers.neuron_scores(layer, x)) >= np.log(2)  # softplus of a logit of 0
        true = np.unpackbits(activations.activity[layer, rows], axis=-1, count=activations.config.d_ff) > 0
        right = (said & true).sum()
        assert report.neurons.recall[layer] == pytest.approx(right / true.sum())
        assert report.neurons.precision[layer] == pytest.approx(right / said.sum())
        assert report.neurons.f1[layer] == pytest.approx(2 * right / (said.sum() + true.sum()))
        best = lambda scores: set(np.argsort(-scores, kind="stable")[:2].tolist())
        pairs = zip(np.asarray(routers.group_scores(layer, x)), activations.norms[layer, rows], strict=True)
        shared = [len(best(scores) & best(norms)) / 2 for scores, norms in pairs]
        assert report.groups.selected[layer] == pytest.approx(np.mean(shared))
        pairs = zip(np.asarray(routers.group_scores(layer, x)), activations.norms[layer, rows], strict=True)
        worth = [[sum(norms[i] ** 2 for i in best(by)) for by in (scores, norms)] for scores, norms in pairs]
        kept, most = np.sum(worth, 0)
        assert report.groups.captured[layer] == pytest.approx(kept / most, rel=1e-5)
        assert report.neurons.captured[layer] == report.neurons.recall[layer]


def test_shuffled_records_are_not_learnt():
    _, report = trained(planted.shuffled(planted.activations()))
    assert max(report.neurons.f1) < 0.7
    assert max(report.groups.selected) < 0.7


def test_training_on_more_tokens_than_fit_in_memory():
    _, report = trained(planted.activations(), dataclasses.replace(QUICK, memory_bytes=100_000))
    assert_solved(report)


@pytest.mark.parametrize("task", [NeuronTask(planted.CONFIG.d_ff), GroupTask(2)])
def test_all_layers_at_once_equal_each_layer_alone(task):
    activations = planted.activations(400)
    options = dataclasses.replace(QUICK, learning_rate=1e-3, max_epochs=3)
    together, quality = fit(task, stacked(activations, task), activations, jax.random.key(3), options)
    for layer in range(activations.config.num_layers):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i : i + 1], stacked(activations, task))
        alone, own = fit(task, one, planted.only_layer(activations, layer), jax.random.key(3), options)
        for name in together:
            assert_close(alone[name][0], together[name][layer], "rounding")
        assert own.epoch[0] == quality.epoch[layer]


def test_the_same_key_gives_the_same_routers():
    activations, options = planted.activations(300), dataclasses.replace(QUICK, max_epochs=2)
    first, second = (jax.tree.leaves(trained(activations, options)[0]) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_layer_keeps_its_own_best_and_stops_by_itself():
    history = [[0.5, 0.2, 0.95], [0.4, 0.3, 0.99], [0.3, 0.4, 0.1], [0.8, 0.5, 1.0]]
    best = Best.start({"w": jnp.zeros((3, 1))})
    for epoch, measured in enumerate(history, 1):
        best = best.update(
            {"w": jnp.full((3, 1), float(epoch))}, np.array(measured), epoch, patience=2, good_enough=0.9
        )
    assert best.weights["w"].tolist() == [
        [1.0],
        [4.0],
        [1.0],
    ]  # stale after 2 more; still gaining; good at once
    assert best.measure.tolist() == [0.5, 0.5, 0.95]
    assert best.epoch.tolist() == [1, 4, 1]
    assert best.done.tolist() == [True, False, True]


@pytest.mark.parametrize("task", [NeuronTask(21), GroupTask(2, "top")])
def test_the_loss_is_the_published_one(task):
    activations = planted.activations(64)
    rows = np.arange(64)
    weights = {name: leaf[1] for name, leaf in stacked(activations, task).items()}
    x, record = activations.router_inputs(rows)[1], activations.records(task.record, rows)[1]
    label = np.asarray(task.labels(record), np.float64)
    p = 1 / (1 + np.exp(-np.asarray(task.scores(weights, x), np.float64)))
    negative = label.mean() + (0.005 if isinstance(task, NeuronTask) else 0.0)
    expected = -(label * np.log(p) + negative * (1 - label) * np.log(1 - p)).mean()
    assert_close(loss(task, weights, x, record), expected, "rounding")


def test_loss_of_importance_compares_shares():
    activations, task = planted.activations(64), GroupTask(2, "importance")
    rows = np.arange(64)
    weights = {name: leaf[1] + 0.1 for name, leaf in stacked(activations, task).items()}
    x, record = activations.router_inputs(rows)[1], activations.records("norms", rows)[1]
    scores = np.asarray(x) @ np.asarray(weights["w_group"]) + np.asarray(weights["b_group"])
    shares = record / record.sum(-1, keepdims=True)
    chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = (shares * (np.log(shares) - np.log(chances))).sum(-1).mean()
    assert_close(loss(task, weights, x, record), expected, "rounding")
    assert_close(loss(task, weights, x, 3 * record), expected, "rounding")
    nothing = jnp.zeros_like(jnp.asarray(record))
    assert float(loss(task, weights, x, nothing)) == 0  # tokens where no group does anything teach nothing


def test_one_router_of_importance_serves_every_density():
    activations = planted.activations()
    routers, report = trained(activations, neurons=False)
    assert min(report.groups.selected) > 0.95
    assert report.groups.selected == report.groups.recall == report.groups.precision
    rows = activations.rows("validation")
    for layer in range(activations.config.num_layers):
        scores = routers.group_scores(layer, jnp.asarray(activations.router_inputs(rows)[layer]))
        for kept in (1, 3):  # it was measured with 2
            found = np.asarray(
                top_mask(scores, kept) & top_mask(jnp.asarray(activations.norms[layer, rows]), kept)
            )
            assert found.sum() > 0.95 * kept * len(rows)


def lost(routers, activations, kept=1) -> float:
    """The share of the squared norms that the routers' selection loses on the validation tokens."""
    rows, losses = activations.rows("validation"), []
    for layer in range(activations.config.num_layers):
        scores = routers.group_scores(layer, jnp.asarray(activations.router_inputs(rows)[layer]))
        energy = activations.norms[layer, rows] ** 2
        losses.append(1 - (energy * top_mask(scores, kept)).sum() / energy.sum())
    return float(np.mean(losses))


def test_importance_beats_ranks_for_rare_large_groups():
    """Group 0 is the largest at 70 % of the tokens, just; group 1 at 30 %, by far, and nothing tells when."""
    activations = planted.activations()
    large = np.random.default_rng(3).random(activations.num_tokens) < 0.3
    norms = np.full_like(activations.norms, 0.1)
    norms[..., 0], norms[..., 1] = 1.0, np.where(large, 5.0, 0.9)
    activations = dataclasses.replace(activations, norms=norms)
    options = dataclasses.replace(QUICK, max_epochs=8)
    ranks = dataclasses.replace(options, group_objective="top")
    top, _ = trained(activations, ranks, neurons=False, head_density=0.25)
    valued, _ = trained(activations, options, neurons=False, head_density=0.25)
    assert lost(top, activations) > 0.8
    assert lost(valued, activations) < 0.2


def test_an_objective_that_there_is_not_is_refused():
    with pytest.raises(pj.InputError, match=r"no such objective; got mse, expected importance \| top"):
        TrainOptions(group_objective="mse")


def test_padding_rows_do_not_count():
    activations, task = planted.activations(32), NeuronTask(21)
    weights = {name: leaf[0] for name, leaf in stacked(activations, task).items()}
    x, record = activations.router_inputs(np.arange(32))[0], activations.records("activity", np.arange(32))[0]
    some = count(task, weights, x, record, jnp.arange(32) < 20)
    alone = count(task, weights, x[:20], record[:20], jnp.ones(20, bool))
    assert {name: float(value) for name, value in some.items()} == {n: float(v) for n, v in alone.items()}


@pytest.mark.parametrize("memory", [10**9, 20_000, 1])
def test_epoch_uses_each_token_at_most_once(memory):
    activations, task = planted.activations(500), NeuronTask(21)
    rows = activations.rows("train")
    feed = Feed(activations, task, rows, batch=16, memory_bytes=memory)
    seen, shapes = [], set()
    for inputs, records, order in feed.epoch(np.random.default_rng(0)):
        shapes.add((inputs.shape, records.shape, order.shape))
        seen += [row.tobytes() for row in np.asarray(inputs)[0][order.ravel()]]
    known = {row.tobytes() for row in activations.inputs[0, rows]}
    assert len(shapes) == 1
    assert (feed.pieces == 1) == (memory == 10**9)
    assert len(seen) == len(set(seen)) and set(seen) <= known
    assert len(known) - len(seen) < feed.pieces * 16


def test_few_tokens_make_one_smaller_batch():
    feed = Feed(planted.activations(20), GroupTask(2), np.arange(5), batch=64, memory_bytes=10**9)
    (_, _, order), *rest = feed.epoch(np.random.default_rng(0))
    assert sorted(order.ravel().tolist()) == [0, 1, 2, 3, 4] and not rest


def test_a_gated_silu_model_has_no_neuron_routers():
    activations = planted.activations(200)
    config = dataclasses.replace(planted.CONFIG, activation="silu")
    activations = dataclasses.replace(activations, config=config, activity=None)
    routers, report = trained(activations, dataclasses.replace(QUICK, max_epochs=1))
    assert report.neurons is None
    assert all(layer.w_in is None and layer.w_out is None for layer in routers.layers)


@pytest.mark.parametrize("density", [0, -0.5, 1.01, float("nan")])
def test_a_bad_density_is_refused(density):
    with pytest.raises(pj.SparsityError, match="not a density"):
        trained(planted.activations(50), head_density=density)


def test_activations_of_another_model_are_refused():
    other = dataclasses.replace(planted.CONFIG, d_ff=22)
    with pytest.raises(pj.SparsityError, match=r"another model; got d_ff 21, expected 22.*polarjax collect"):
        train_routers(planted.activations(50), other, jax.random.key(0))


def test_activations_without_validation_tokens_are_refused():
    activations = dataclasses.replace(planted.activations(50), part=np.zeros(50, np.uint8))
    with pytest.raises(pj.InputError, match="no validation tokens"):
        trained(activations)


def test_activations_that_are_not_finite_are_refused():
    activations = planted.activations(200)
    inputs = activations.inputs.copy()
    inputs[1] = np.nan
    activations = dataclasses.replace(activations, inputs=inputs)
    with pytest.raises(pj.SparsityError, match="router of layer 1: training diverged"):
        trained(activations)


@pytest.mark.parametrize("name", ["learning_rate", "neuron_batch", "max_epochs", "patience", "rank"])
def test_options_that_cannot_be_are_refused(name):
    with pytest.raises(pj.InputError, match=f"TrainOptions: {name} is not usable; got 0"):
        TrainOptions(**{name: 0})


def test_groups_alone_are_learnt_as_beside_neurons():
    data, options = planted.activations(), dataclasses.replace(QUICK, max_epochs=2)
    both, _ = trained(data, options)
    alone, report = trained(data, options, neurons=False)
    assert report.neurons is None
    for one, other in zip(alone.layers, both.layers, strict=True):
        assert one.w_in is None and one.w_out is None and other.w_in is not None
        assert (np.asarray(one.w_group) == other.w_group).all() and np.asarray(one.w_group).any()
