"""Calibration against a brute force of sets and loops, and what it must not lose or accept."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from pallas_kernels import select_top_k
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.sparsity import calibrate, calibration
from polarjax.sparsity.activations import Activations
from polarjax.sparsity.calibration import HeldOut, choose, measure_recall, random_batches
from polarjax.sparsity.options import CalibrateOptions
from polarjax.sparsity.shards import assign_groups
from tests.sparsity import planted

OPTIONS = CalibrateOptions(batch_sizes=(1, 2, 5, 16), target_recall=0.9, multiple=2, num_batches=40)
KEY = jax.random.key(7)


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch):
    """300 tokens are scored in three pieces, of which the last two overlap."""
    monkeypatch.setattr(calibration, "_TOKENS", 128)


def problem(seed: int, *, whole_numbers: bool, width: int = 21) -> tuple[Activations, Routers]:
    """Random records, sparser in the early layers, and routers that know something of them.

    With whole numbers many scores are equal, so that ties decide.
    """
    random = np.random.default_rng(seed)
    L, D, F, K = (planted.CONFIG.num_layers, planted.CONFIG.d_model, width, 4)
    draw = lambda *shape: random.integers(-1, 2, shape) if whole_numbers else random.normal(size=shape)
    inputs, w_in, w_out = draw(L, 300, D), draw(L, D, 3), draw(L, 3, F)
    logits = np.einsum("lnd,ldr,lrf->lnf", inputs, w_in, w_out) + random.normal(size=(L, 300, F))
    active = logits > np.quantile(logits, [0.99, 0.95, 0.7], axis=(1, 2)).diagonal()[:, None, None]
    active[0, :30] = False  # batches in which nothing is active
    activations = dataclasses.replace(
        planted.activations(300, seed=seed),
        config=dataclasses.replace(planted.CONFIG, d_ff=width),
        inputs=inputs.astype(np.float32),
        activity=np.packbits(active, axis=-1),
    )
    f32 = lambda array: jnp.asarray(array, jnp.float32)
    zeros = jnp.zeros((D, K)), jnp.zeros(K)
    return activations, Routers(tuple(LayerRouter(f32(w_in[i]), f32(w_out[i]), *zeros) for i in range(L)))


def brute_force(activations: Activations, routers: Routers, held_out: HeldOut, options: CalibrateOptions):
    """k and recall for each layer and batch size, by sorting lists and intersecting sets."""
    width = activations.config.d_ff
    for layer in range(activations.config.num_layers):
        x = jnp.asarray(activations.inputs[layer, held_out.rows])
        scores = np.asarray(routers.neuron_scores(layer, x))
        active = np.unpackbits(activations.activity[layer, held_out.rows], axis=-1, count=width)
        least = 0
        for size in options.batch_sizes:
            recalls = [
                curve(scores[batch], active[batch], options.shards) for batch in held_out.batches[size]
            ]
            mean = np.mean(recalls, axis=0)
            reached = 1 + next(i for i, recall in enumerate(mean) if recall >= options.target_recall)
            multiple = math.lcm(options.multiple, options.shards)
            k = max(least, min(width, multiple * -(-reached // multiple)))
            least = k
            dense = k > (0.8 if size <= 128 else 0.3) * width
            yield layer, size, None if dense else k, 1.0 if dense else mean[k - 1]


def curve(scores: np.ndarray, active: np.ndarray, shards: int) -> list[float]:
    """Recall of one batch [B F] at k = 1 … F, as far as the best k / shards of each shard are k neurons, else 0."""
    total = [sum(np.float32(score) for score in column) for column in scores.T]
    each = len(total) // shards
    blocks = [range(first, first + each) for first in range(0, len(total), each)]
    orders = [sorted(block, key=lambda neuron: (-total[neuron], neuron)) for block in blocks]
    truth = {neuron for neuron in range(len(total)) if active[:, neuron].any()}
    kept = lambda k: {neuron for order in orders for neuron in order[: k // shards]}
    recall = lambda k: len(truth & kept(k)) / len(truth) if truth else 1.0
    return [0.0 if k % shards else recall(k) for k in range(1, len(total) + 1)]


CASES = [
    *((seed, whole_numbers, 21, 1) for seed, whole_numbers in itertools.product(range(3), (True, False))),
    (0, True, 20, 2),
    (1, False, 20, 4),
]


@pytest.mark.parametrize(("seed", "whole_numbers", "width", "shards"), CASES)
def test_plans_equal_those_of_brute_force(seed, whole_numbers, width, shards):
    activations, routers = problem(seed, whole_numbers=whole_numbers, width=width)
    activations = dataclasses.replace(activations, part=np.ones(300, np.uint8))
    options = dataclasses.replace(OPTIONS, shards=shards)
    table = calibrate(activations, routers, activations.config, key=KEY, options=options)
    assert (table.neuron_shards, table.group_shards) == (shards, shards)
    held_out = HeldOut(activations, routers, KEY, sizes=OPTIONS.batch_sizes, options=options)
    plans = list(brute_force(activations, routers, held_out, options))
    measured = measure_recall(activations, routers, table, key=KEY, part="validation", options=options)
    assert np.allclose(measured, table.recall, atol=1e-6)
    assert {k for *_, k, _ in plans} > {None} and len({k for *_, k, _ in plans}) > 3
    for layer, size, k, recall in plans:
        row = OPTIONS.batch_sizes.index(size)
        assert table.neurons[row][layer] == k
        assert table.recall[row][layer] == pytest.approx(recall, abs=1e-6)


@pytest.mark.parametrize("k", [1, 4, 13, 21])
@pytest.mark.parametrize("size", [1, 5])
def test_recall_is_that_of_what_decoding_selects(k, size):
    activations, routers = problem(0, whole_numbers=True)
    held_out = HeldOut(activations, routers, KEY, sizes=(size,), options=OPTIONS, part=None)
    scores, active = held_out.layer(1)
    found = []
    for batch in held_out.batches[size]:
        chosen = np.asarray(
            select_top_k(
                routers.neuron_scores(1, jnp.asarray(activations.inputs[1, held_out.rows[batch]])),
                k,
                shared=True,
            )
        )
        truth = np.asarray(active)[batch].any(0)
        found.append(truth[chosen].sum() / truth.sum() if truth.any() else 1.0)
    assert held_out.curve((scores, active), size)[k - 1] == pytest.approx(np.mean(found), abs=1e-6)


def test_plans_never_shrink_as_the_batch_grows():
    activations, routers = problem(5, whole_numbers=False)
    options = dataclasses.replace(OPTIONS, multiple=1, num_batches=2, target_recall=0.5)
    activations = dataclasses.replace(activations, part=np.ones(300, np.uint8))
    table = calibrate(activations, routers, activations.config, key=KEY, options=options)
    for layer in range(activations.config.num_layers):
        counts = [activations.config.d_ff if row[layer] is None else row[layer] for row in table.neurons]
        assert counts == sorted(counts)


def test_calibration_uses_validation_tokens_only():
    activations, routers = problem(1, whole_numbers=False)
    spoilt = activations.activity.copy()
    spoilt[:, activations.rows("train")] = 255
    spoilt[:, activations.rows("test")] = 255
    options = dataclasses.replace(OPTIONS, batch_sizes=(1, 2))
    tables = [
        calibrate(
            dataclasses.replace(activations, activity=activity),
            routers,
            activations.config,
            key=KEY,
            options=options,
        )
        for activity in (activations.activity, spoilt)
    ]
    assert tables[0] == tables[1]


def test_recall_of_a_table_is_measured_on_the_part_asked_for():
    activations, routers = problem(2, whole_numbers=False)
    activations = dataclasses.replace(activations, part=np.repeat([1, 2], 150).astype(np.uint8))
    table = calibrate(activations, routers, activations.config, key=KEY, options=OPTIONS)
    same = measure_recall(activations, routers, table, key=KEY, part="validation", options=OPTIONS)
    assert np.allclose(same, table.recall, atol=1e-6)
    silent = activations.activity.copy()
    silent[:, 150:] = 0
    nothing = dataclasses.replace(activations, activity=silent)
    assert np.all(np.array(measure_recall(nothing, routers, table, key=KEY, options=OPTIONS)) == 1.0)
    other = measure_recall(activations, routers, table, key=KEY, options=OPTIONS)
    assert other != same
    assert all(
        found == 1.0
        for counts, row in zip(table.neurons, other, strict=True)
        for k, found in zip(counts, row, strict=True)
        if k is None
    )


def test_random_batches_cover_all_tokens():
    batches = random_batches(np.random.default_rng(0), 23, 5, 9)
    assert batches.shape == (9, 5)
    assert all(len(set(batch)) == 5 for batch in batches.tolist())
    assert len(set(batches[:4].ravel().tolist())) == 20  # one cut
    assert set(batches.ravel().tolist()) <= set(range(23))


def test_a_model_that_is_not_relu_stays_dense():
    config = dataclasses.replace(planted.CONFIG, activation="gelu")
    activations = dataclasses.replace(planted.activations(30), config=config, activity=None)
    routers = Routers((LayerRouter(None, None, jnp.zeros((12, 4)), jnp.zeros(4)),) * 3)
    table = calibrate(activations, routers, config, key=KEY, head_density=0.25)
    assert set(itertools.chain(*table.neurons)) == {None}
    assert table.for_batch(8, config) == pj.SparsityPlan((None,) * 3, (None, 1, 1))
    assert set(itertools.chain(*measure_recall(activations, routers, table, key=KEY))) == {1.0}


def test_most_important_layer_stays_dense():
    activations, routers = problem(0, whole_numbers=True)
    change = np.full((3, 300), 0.1, np.float32)
    change[1, activations.rows("train")] = 0.2
    change[2, activations.rows("validation")] = 0.9  # not what is learnt from
    activations = dataclasses.replace(activations, change=change)
    make = lambda **wanted: calibrate(
        activations,
        routers,
        activations.config,
        key=KEY,
        options=dataclasses.replace(OPTIONS, batch_sizes=(1,), **wanted),
    )
    assert make().dense_layers == (0,)
    assert make(dense_attention="important").dense_layers == (1,)
    activations = dataclasses.replace(activations, change=None)
    with pytest.raises(pj.SparsityError, match="hold no change"):
        make(dense_attention="important")


def test_too_few_held_out_tokens_are_refused():
    activations, routers = problem(0, whole_numbers=True)
    got = len(activations.rows("validation"))
    with pytest.raises(pj.InputError, match=rf"validation part.*got {got} tokens, expected at least 512"):
        calibrate(activations, routers, activations.config, key=KEY)


def test_parts_of_another_model_are_refused():
    activations, routers = problem(0, whole_numbers=True)
    config, options = activations.config, dataclasses.replace(OPTIONS, batch_sizes=(1,))
    with pytest.raises(pj.SparsityError, match="routers are for another model; got 2 layers"):
        calibrate(activations, Routers(routers.layers[:2]), config, key=KEY, options=options)
    with pytest.raises(pj.SparsityError, match="activations are of another model"):
        calibrate(
            dataclasses.replace(activations, config=dataclasses.replace(config, max_positions=9)),
            routers,
            config,
            key=KEY,
            options=options,
        )
    table = calibrate(activations, routers, config, key=KEY, options=options)
    fewer = dataclasses.replace(table, num_layers=2, neurons=((2, 2),), recall=((1.0, 1.0),))
    with pytest.raises(pj.SparsityError, match="plans are for another model; got 2 layers"):
        measure_recall(activations, routers, fewer, key=KEY)
    with pytest.raises(pj.SparsityError, match="not a density"):
        calibrate(activations, routers, config, key=KEY, options=options, head_density=0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_sizes": ()},
        {"batch_sizes": (2, 1)},
        {"batch_sizes": (0, 1)},
        {"target_recall": 1.1},
        {"multiple": 0},
        {"dense_attention": "last"},
        {"shards": 0},
        {"attention": "heads"},
    ],
)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(pj.InputError):
        CalibrateOptions(**wrong)


def test_recall_rounds_down():
    rounded = np.full(100, np.nextafter(np.float32(1), np.float32(0)))
    assert choose(rounded, 1, 1, dataclasses.replace(OPTIONS, target_recall=1.0)) is None


def test_larger_batches_keep_at_least_as_many():
    rising = np.minimum(np.arange(1, 101) / 20, 1.0)
    options = dataclasses.replace(OPTIONS, target_recall=1.0)
    assert [choose(rising, smallest, 1, options) for smallest in (1, 20, 31)] == [20, 20, 31]


@pytest.mark.parametrize(("batch_size", "k"), [(1, 50), (128, 50), (129, None), (512, None)])
def test_large_batches_are_dense_sooner(batch_size, k):
    half = np.minimum(np.arange(1, 101) / 50, 1.0)  # all is found with half of the neurons
    assert choose(half, 1, batch_size, dataclasses.replace(OPTIONS, target_recall=1.0)) == k


def lost(chosen: np.ndarray, order: Sequence[int], shards: int) -> int:
    """Selected groups beyond each shard's equal share, over all tokens."""
    share = chosen[0].sum() // shards
    counts = chosen[:, list(order)].reshape(len(chosen), shards, -1).sum(-1)
    return int(np.maximum(counts - share, 0).sum())


@pytest.mark.parametrize("shards", [2, 4])
def test_groups_that_are_selected_together_go_to_different_shards(shards):
    """The loss is the smallest of all assignments, or near it, and far below that of the model's own order."""
    random = np.random.default_rng(shards)
    scores = np.repeat(random.normal(size=(200, 4)), 2, axis=1)  # neighbors are selected together
    scores += 0.1 * random.normal(size=scores.shape)
    chosen = np.zeros((200, 8), bool)
    np.put_along_axis(chosen, np.argsort(-scores, axis=1)[:, :4], True, axis=1)
    order = assign_groups(chosen, shards)
    assert sorted(order) == list(range(8))
    rows = np.reshape(order, (shards, -1))
    assert (np.sort(rows, axis=1) == rows).all()
    every = [lost(chosen, each, shards) for each in random.permuted(np.tile(np.arange(8), (300, 1)), axis=1)]
    assert lost(chosen, order, shards) <= min(every)
    assert lost(chosen, order, shards) < 0.5 * lost(chosen, range(8), shards)


def test_calibration_assigns_groups_by_what_routers_select():
    activations, routers = problem(0, whole_numbers=False, width=20)
    w_group = jnp.zeros((12, 4)).at[0, :2].set(1.0).at[0, 2:].set(-1.0)  # together: 0 and 1, or 2 and 3
    layers = tuple(dataclasses.replace(layer, w_group=w_group) for layer in routers.layers)
    make = lambda **changes: calibrate(
        activations,
        Routers(layers),
        activations.config,
        key=KEY,
        options=dataclasses.replace(OPTIONS, batch_sizes=(1,), **changes),
    )
    assert {len({row[0] // 2, row[1] // 2}) for row in make(shards=2).order} == {2}
    assert make(shards=4).order == make(shards=2, attention="sequences").order == make().order == ()
    assert make(shards=2, attention="sequences").group_shards == 1
    with pytest.raises(pj.InputError, match=r"shards: 4 KV heads \(groups\) can't be divided"):
        make(shards=3)
