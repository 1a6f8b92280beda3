"""Bytes and operations of a decoding step, against sums done by hand and against the real parameters."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from polarjax import costs
from polarjax.errors import InputError, SparsityError
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
