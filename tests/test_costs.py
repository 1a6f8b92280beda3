"""Bytes and operations of a decoding step, against sums done by hand and against the real parameters."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.all_reduce_norm import problem
from polarjax import costs
from polarjax.errors import InputError, SparsityError
from polarjax.model.exchanges import (
    KERNEL_DEVICES,
    KERNEL_ELEMENTS,
    KERNEL_UNIT,
    Exchange,
    Link,
    exchanges,
)
from polarjax.model.mesh_shape import MeshShape
from polarjax.selection.plans import SparsityPlan, dense_plan
from tests.model import zoo
from tests.one_line import refuses

OPT = dataclasses.replace(
    zoo.CONFIGS["opt"],
    vocab_size=10,
    d_model=4,
    d_ff=6,
    num_heads=2,
    num_kv_heads=2,
    head_dim=3,
    max_positions=16,
)
LLAMA = dataclasses.replace(
    zoo.CONFIGS["llama-mha"], vocab_size=10, d_model=4, d_ff=6, num_kv_heads=2, head_dim=2, max_positions=16
)
FAMILIES = {
    "opt": OPT,
    "opt, narrow embedding": dataclasses.replace(OPT, embed_dim=3, norm_position="post", final_norm=False),
    "llama": LLAMA,
    "qwen": dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True, mlp_bias=True),
}


def test_dense_bytes_by_hand():
    cost = costs.decode_bytes(OPT, batch_size=3, cache_length=5, dtype=jnp.float32)
    attention = (4 * 4 * 6) + 3 * 6 + 4 + 8  # four 4x6 projections, their biases, the norm
    mlp = 2 * 4 * 6 + 6 + 4 + 8
    assert cost.attention == 4 * 2 * attention
    assert cost.mlp == 4 * 2 * mlp
    assert cost.head == 4 * (10 * 4 + 8 + 3 * 4 + 3 * 4)
    assert cost.cache == 4 * 2 * (2 * 3 * 2 * 3 * (5 + 1))
    assert cost.routers == 0
    assert cost.total == cost.attention + cost.mlp + cost.head + cost.cache
    assert cost.per_token == cost.total / 3


def test_sparse_bytes_by_hand():
    plan = SparsityPlan(neurons=(2, None), groups=(None, 1))
    dense = costs.decode_bytes(OPT, batch_size=3, cache_length=5, dtype=jnp.float32)
    cost = costs.decode_bytes(OPT, batch_size=3, cache_length=5, plan=plan, dtype=jnp.float32, router_rank=2)
    assert dense.mlp - cost.mlp == 4 * (6 - 2) * (2 * 4 + 1)
    assert dense.cache - cost.cache == 4 * 2 * 3 * 3 * (2 - 1) * 5
    assert cost.routers == 4 * ((4 * 2 + 2) + 2 * (4 + 6))
    assert (cost.attention, cost.head) == (dense.attention, dense.head)
    call = {"batch_size": 3, "cache_length": 5, "plan": plan, "router_rank": 2, "mean_outputs": True}
    with_means = costs.decode_bytes(OPT, dtype=jnp.float32, **call)
    assert dataclasses.replace(with_means, routers=cost.routers) == cost
    assert with_means.routers - cost.routers == 4 * 4 * 2  # K·D in the one layer that selects groups
    wide = costs.decode_bytes(OPT, dtype=jnp.float32, router_width=3, **call)
    assert wide.routers - with_means.routers == 4 * 3 * (4 + 2)  # W·(D + K)


def test_flops_by_hand():
    plan = SparsityPlan(neurons=(None, None), groups=(None, 1))
    cost = costs.decode_flops(LLAMA, batch_size=3, cache_length=5, plan=plan)
    assert cost.attention == 2 * 3 * 2 * (2 * 4 * 8 + 2 * 4 * 4)
    assert cost.mlp == 2 * 3 * 2 * 3 * 4 * 6
    assert cost.head == 2 * 3 * 10 * 4
    assert cost.cache == 4 * 3 * 2 * 5 * 2 * (2 + 1)  # 4·B·G·s·H, two groups in layer 0 and one in layer 1
    assert cost.routers == 2 * 3 * 4 * 2
    call = {"batch_size": 3, "cache_length": 5, "plan": plan, "mean_outputs": True}
    assert costs.decode_flops(LLAMA, **call).routers == 2 * cost.routers
    assert costs.decode_flops(LLAMA, router_width=3, **call).routers == 2 * cost.routers + 2 * 3 * 3 * (4 + 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_step_bytes_exclude_unused_embedding_rows(name):
    config = FAMILIES[name]
    cost = costs.decode_bytes(config, batch_size=1, cache_length=1, dtype=jnp.bfloat16)
    width = config.embed_dim or config.d_model
    learned = config.positions == "learned"
    unread = 0 if config.tie_embeddings else 2 * config.vocab_size * width
    unread += 2 * (config.max_positions + config.position_offset) * config.d_model if learned else 0
    rows = 2 * (width + (config.d_model if learned else 0))
    assert cost.total - cost.cache - rows + unread == costs.weights_bytes(config, jnp.bfloat16)


def test_window_bounds_the_cache_and_dense_plan_is_free():
    windowed = dataclasses.replace(LLAMA, sliding_window=(4, None))
    cost = costs.decode_bytes(windowed, batch_size=1, cache_length=9, dtype=jnp.bfloat16)
    assert cost.cache == 2 * 2 * 2 * (2 * 4 + 2 + 2 * 9 + 2)
    assert cost == costs.decode_bytes(windowed, batch_size=1, cache_length=9, plan=dense_plan(windowed))
    assert costs.cache_bytes_per_token(LLAMA, jnp.bfloat16) == 2 * 2 * 2 * 2 * 2


@pytest.mark.parametrize("memory", [math.inf, -math.inf, math.nan, np.float32("inf")])
def test_memory_has_to_be_finite(memory):
    with refuses(InputError, f"costs: memory is not finite; got {memory}"):
        costs.largest_batch(OPT, memory=memory, cache_length=1)


def test_any_finite_memory_holds_a_batch():
    assert costs.largest_batch(OPT, memory=-1.0, cache_length=1) == 0
    each = costs.cache_bytes_per_token(OPT) + 4 * OPT.vocab_size
    assert (
        costs.largest_batch(OPT, memory=10**400, cache_length=1)
        == (10**400 - costs.weights_bytes(OPT)) // each
    )


def test_refusals():
    with pytest.raises(InputError, match="cache_length is not usable; got 0"):
        costs.decode_bytes(OPT, batch_size=1, cache_length=0)
    with pytest.raises(SparsityError, match="another number of layers"):
        costs.decode_flops(OPT, batch_size=1, cache_length=1, plan=SparsityPlan((None,), (None,)))


@pytest.mark.parametrize("attention", ["groups", "sequences"])
@pytest.mark.parametrize("name", FAMILIES)
def test_devices_divide_what_they_do_not_repeat(name, attention):
    """Summed over the devices, a step costs what it costs on one, and the parts that every device reads again."""
    config = FAMILIES[name]
    mesh = MeshShape(data=3, model=2, attention=attention)
    plan = SparsityPlan(neurons=(4, None), groups=(None, 2))
    call = {"cache_length": 5, "plan": plan, "dtype": jnp.float32, "router_rank": 2}
    alone = costs.decode_bytes(config, batch_size=4, **call)  # the sequences of one index of `data`
    shared = costs.decode_bytes(config, batch_size=12, mesh=mesh, **call)
    assert shared.batch_size == 4
    assert mesh.model * shared.cache == alone.cache
    one = costs.decode_bytes(config, batch_size=1, **call)
    repeated = (alone.head - one.head) // 3 * 4  # embedding rows
    norm = config.d_model * (2 if config.norm_bias else 1)
    repeated += 4 * ((norm if config.final_norm else 0) + 2 * (config.embed_dim or 0) * config.d_model)
    assert mesh.model * shared.head - alone.head == (mesh.model - 1) * repeated
    down = config.d_model if config.mlp_bias else 0
    assert mesh.model * shared.mlp - alone.mlp == 4 * 2 * (norm + down) * (mesh.model - 1)
    whole, part = (costs.weights_bytes(config, mesh=each) for each in (MeshShape(), mesh))
    assert whole / 2 < part < whole


def test_largest_batch_and_exchanges_of_a_mesh():
    config = LLAMA
    each = 9 * costs.cache_bytes_per_token(config) // 2 + 4 * config.vocab_size // 2
    for attention, rows in (("groups", 5), ("sequences", 4)):
        mesh = MeshShape(data=3, model=2, attention=attention)
        memory = costs.weights_bytes(config, mesh=mesh) + 5 * each + 1
        assert costs.largest_batch(config, memory=memory, cache_length=9, mesh=mesh) == 3 * rows
        found = exchanges(config, mesh, batch_size=12)
        operand = 2 * 4 * config.d_model
        layers = Exchange("all-reduce", 2 * config.num_layers, operand)
        assert found[:2] == (layers, Exchange("all-reduce", 1, operand))
        heads = [exchange.num_bytes for exchange in found[2:]]
        assert heads == ([] if attention == "groups" else [2 * 4 * 2 * (1 + 2 + 1), 2 * 4 * 2 * 2])
    assert exchanges(config, MeshShape(data=3), batch_size=12) == ()
    wide = dataclasses.replace(config, d_model=2048)
    kind = lambda batch, devices=2, **more: (
        exchanges(wide, MeshShape(model=devices), batch_size=batch, **more)[0].kind
    )
    assert [kind(512), kind(513), kind(12, item=4)] == ["sum", "all-reduce", "all-reduce"]
    assert (KERNEL_UNIT, KERNEL_DEVICES, KERNEL_ELEMENTS) == (
        problem.UNIT,
        problem.MAX_DEVICES,
        problem.MAX_RECEIVED,
    )


def test_step_floor_is_bytes_over_bandwidth_and_the_exchanges_over_the_link():
    link = Link(((100.0, 1.0), (200.0, 2.0)), hop=0.5, sums=((100.0, 0.5), (300.0, 1.5)))
    assert [link.seconds(Exchange("sum", 1, 100), n) for n in (1, 2, 3)] == [0.0, 0.5, 1.0]
    reduce = Exchange("all-reduce", 1, 150)
    assert [link.seconds(reduce, n) for n in (1, 2)] == [0.0, 1.5]
    assert link.seconds(reduce, 4) == 2.25 + 4 * 0.5  # 1.5 times the bytes, four more steps
    assert link.seconds(Exchange("all-to-all", 1, 150), 2) == 1.0  # smaller than the first point
    call = {"batch_size": 4, "cache_length": 5, "mesh": MeshShape(model=2)}
    reading, exchanging = costs.step_floor(LLAMA, bandwidth=10.0, link=link, **call)
    assert reading == costs.decode_bytes(LLAMA, **call).total / 10.0
    assert exchanging == (2 * LLAMA.num_layers + 1) * 1.0
    assert costs.step_floor(LLAMA, **call | {"mesh": MeshShape(data=2)}, bandwidth=1.0)[1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: MeshShape(model=3).local(OPT),
            r"mesh: 2 KV heads \(groups\) .*model=3, expected model=1 \| 2",
        ),
        (
            lambda: MeshShape(model=4).check(dataclasses.replace(OPT, num_kv_heads=4, num_heads=4)),
            "6 neurons",
        ),
        (
            lambda: MeshShape(model=2).check(dataclasses.replace(OPT, vocab_size=61)),
            r"61 vocabulary entries .*Hint: .*rules=\{\"vocab\": None\}, or --mesh model=2,vocab=whole",
        ),
        (lambda: MeshShape(data=0), "mesh: data is not usable"),
        (lambda: MeshShape(attention="heads"), "attention: no such way to divide attention"),
        (lambda: MeshShape(data=2).rows(3), "mesh: .*got 3 sequences over 2 devices, .*use 4"),
        (lambda: MeshShape(model=2, attention="sequences").rows(3), "3 sequences over 2 devices"),
        *(
            (lambda text=text: MeshShape.parse(text), "--mesh: not a mesh; got ")
            for text in (
                "",
                "4",
                "model",
                "model=0",
                "model=2,model=2",
                "tensor=2",
                "model=2,",
                "vocab=whole",
            )
        ),
    ],
)
def test_meshes_that_do_not_fit(call, message):
    with refuses(InputError, message):
        call()


def test_mesh_from_text():
    assert MeshShape.parse("model=4") == MeshShape(model=4)
    assert MeshShape.parse(" model=2 , data=8", attention="sequences") == MeshShape(8, 2, "sequences")
    whole = MeshShape.parse("model=2, vocab = whole")
    assert whole == MeshShape(model=2, divided=("groups", "neurons"))
    assert whole.local(dataclasses.replace(OPT, vocab_size=61)).vocab_size == 61
