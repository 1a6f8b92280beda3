"""Plans: how much each layer keeps, by batch size."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import polarjax as pj
from polarjax.selection.plans import dense_plan, uniform_groups
from tests.one_line import refuses
from tests.sparsity.planted import CONFIG

L, F, K = CONFIG.num_layers, CONFIG.d_ff, CONFIG.num_kv_heads
TABLE = pj.PlanTable(
    num_layers=L,
    num_neurons=F,
    num_groups=K,
    batch_sizes=(1, 2, 8),
    neurons=((4, 5, None), (8, 9, None), (16, None, None)),
    recall=((0.99, 0.991, 1.0),) * 3,
    head_density=0.5,
)
SHARDED = dataclasses.replace(
    TABLE,
    neurons=((3, 6, None), (9, 9, None), (18, None, None)),
    neuron_shards=3,
    group_shards=2,
    order=((0, 2, 1, 3),) * L,
)


@given(st.floats(0, 1, exclude_min=True))
def test_group_counts_round_down_to_at_least_one(density):
    counts = uniform_groups(CONFIG, density)
    assert counts[0] is None, "the first layer's attention stays dense, as published"
    assert set(counts[1:]) == {max(1, math.floor(density * K + 1e-9))}


@pytest.mark.parametrize(("density", "kept"), [(0.1, 1), (0.5, 2), (0.75, 3), (0.74, 2), (1.0, 4), (1, 4)])
@pytest.mark.parametrize("kind", [lambda x: x, np.float32, np.float16], ids=["python", "float32", "float16"])
def test_group_counts(density, kept, kind):
    density = kind(density)
    assert uniform_groups(CONFIG, density, dense_layers=()) == (kept,) * L


def test_other_layers_can_stay_dense():
    assert uniform_groups(CONFIG, 0.5, dense_layers=(1, 2)) == (2, None, None)


@pytest.mark.parametrize(
    "density", [0, -0.5, 1.01, math.nan, math.inf, "half", None, True + 1, np.float32(2)]
)
def test_densities_out_of_range(density):
    with refuses(pj.SparsityError, r"^head density: not a density.*above 0 and at most 1"):
        uniform_groups(CONFIG, density)


@pytest.mark.parametrize(
    ("neurons", "groups", "named"),
    [
        ((1, 2), (1,), "different numbers of layers"),
        ((0, 2), (1, 1), "layer 0 has an invalid number of neurons"),
        ((1, 2), (1, -1), "layer 1 has an invalid number of groups"),
        ((1, 2.0), (1, 1), "layer 1 has an invalid number of neurons"),
        ((1, True), (1, 1), "layer 1 has an invalid number of neurons"),
        ("12", (1, 1), "numbers of neurons are not a tuple"),
    ],
)
def test_plans_that_cannot_be(neurons, groups, named):
    with refuses(pj.SparsityError, named):
        pj.SparsityPlan(neurons, groups)


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        (pj.SparsityPlan((4,) * (L + 1), (1,) * (L + 1)), rf"got {L + 1} layers, expected {L}"),
        (pj.SparsityPlan((4, 4, F + 1), (1,) * L), rf"more neurons.*got {F + 1}, expected at most {F}"),
        (pj.SparsityPlan((4,) * L, (1, K + 1, None)), rf"more groups.*got {K + 1}, expected at most {K}"),
    ],
)
def test_plans_of_another_model(plan, named):
    with refuses(pj.SparsityError, named):
        plan.check(CONFIG)


def test_plans_are_static_values():
    plan = dense_plan(CONFIG)
    plan.check(CONFIG)
    assert plan == pj.SparsityPlan((None,) * L, (None,) * L)
    assert hash(plan) == hash(dense_plan(CONFIG))
    assert jax.tree.leaves(pj.Sparsity(None, plan)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch_size", "neurons"),
    [
        (1, (4, 5, None)),
        (2, (8, 9, None)),
        (3, (16, None, None)),
        (8, (16, None, None)),
        (9, (None, None, None)),
        (512, (None, None, None)),
    ],
)
def test_batch_uses_next_larger_plan_or_dense_mlps(batch_size, neurons):
    plan = TABLE.for_batch(batch_size, CONFIG)
    assert plan == pj.SparsityPlan(neurons, (None, 2, 2))


def test_the_head_density_can_be_overridden():
    assert TABLE.for_batch(1, CONFIG, 0.75).groups == (None, 3, 3)
    assert TABLE.for_batch(1, CONFIG, np.float32(0.75)).groups == (None, 3, 3)
    with refuses(pj.SparsityError, "head density"):
        TABLE.for_batch(1, CONFIG, 0)


def test_a_density_of_numpy_is_kept_as_a_plain_number():
    table = dataclasses.replace(TABLE, head_density=np.float32(0.5))
    assert json.loads(json.dumps(table.to_json()))["head_density"] == 0.5


def test_tables_are_for_one_model():
    other = dataclasses.replace(CONFIG, num_layers=L + 1)
    with refuses(pj.SparsityError, rf"got {L} layers, {F} neurons, {K} groups, expected {L + 1}"):
        TABLE.for_batch(1, other)


def test_a_table_may_keep_another_layer_dense():
    other = dataclasses.replace(TABLE, dense_layers=(1,))
    assert other.for_batch(1, CONFIG).groups == (2, None, 2)
    assert other.for_batch(1, CONFIG, 0.75).groups == (3, None, 3)


def test_shards_keep_equally_many_groups():
    """Counts are rounded up to what all shards can keep equally; where that is everything, nothing is skipped."""
    keeping = lambda density, shards: dataclasses.replace(TABLE, group_shards=shards).for_batch(
        9, CONFIG, density
    )
    assert keeping(0.25, 2) == pj.SparsityPlan((None,) * L, (None, 2, 2), group_shards=2)
    assert keeping(0.75, 2).groups == keeping(0.25, 4).groups == (None,) * L
    assert keeping(1.0, 2).groups == (None, 4, 4)
    budgets = tuple((k, k, k) for k in range(1, K + 1))
    assert dataclasses.replace(TABLE, group_shards=2, budgets=budgets).for_batch(9, CONFIG).groups == (
        2,
        2,
        2,
    )
    ordered = pj.SparsityPlan((3, 6, None), (None, 2, 2), 3, 2, group_order=SHARDED.order)
    assert SHARDED.for_batch(1, CONFIG) == ordered
    assert [dataclasses.replace(TABLE, group_shards=n).skips_no_groups for n in (1, 2, 4)] == [
        False,
        False,
        True,
    ]


def test_tables_survive_json():
    for table in (TABLE, SHARDED, dataclasses.replace(TABLE, dense_layers=(1, 2))):
        assert pj.PlanTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_old_table_keeps_first_layer_dense():
    data = TABLE.to_json()
    for name in ("dense_layers", "budgets", "neuron_shards", "group_shards", "order"):
        del data[name]
    assert pj.PlanTable.from_json(data) == TABLE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_sizes": (1, 8, 2)}, "increasing batch sizes"),
        ({"batch_sizes": (1, 2)}, "one plan each"),
        ({"batch_sizes": (0, 2, 8)}, "increasing batch sizes"),
        ({"recall": ()}, "one plan each"),
        ({"head_density": 0}, "plan table: not a density"),
        ({"dense_layers": (L,)}, rf"layers that don't exist; got \({L},\), expected numbers from 0"),
        ({"dense_layers": (-1,)}, "layers that don't exist"),
        ({"neurons": ((4, 5), (8, 9), (16, 16))}, "different numbers of layers"),
        ({"neuron_shards": 3}, "4 neurons can't be divided over 3 shards"),
        ({"group_shards": 3}, "4 groups can't be divided over 3 shards"),
        ({"group_shards": 0}, "group_shards is not usable"),
        ({"order": ((0, 1, 2, 3),)}, "unusable order of groups"),
        ({"order": ((0, 1, 2, 2),) * L}, "unusable order of groups"),
    ],
)
def test_tables_that_cannot_be(changes, named):
    with refuses(pj.SparsityError, named):
        dataclasses.replace(TABLE, **changes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.pop("neurons"),
        lambda data: data.update(neurons=3),
        lambda data: data.update(batch_sizes=None),
        lambda data: data.update(dense_layers=0),
        lambda data: data.update(unknown=1),
    ],
)
def test_json_that_is_no_table(spoil):
    data = TABLE.to_json()
    spoil(data)
    with refuses(pj.SparsityError, "^plans: not a plan table"):
        pj.PlanTable.from_json(data)
