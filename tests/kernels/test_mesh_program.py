"""A decoding step on four H200s, compiled without them: what devices exchange, what is donated, and how much memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import polarjax as pj
from polarjax.generation.batch import make_rules
from polarjax.generation.token_loop import LoopState, Rules
from polarjax.model.mesh_shape import MeshShape
from polarjax.model.parameters import abstract, parameters, with_parameters
from polarjax.model.vocab_parts import vocab_divided
from polarjax.selection.routers import init_routers
from polarjax.sharding import parameter_shardings
from tests.kernels import aot
from tests.model import zoo

B, S, DEVICES, BEST = 16, 1024, 4, 5
CONFIG = dataclasses.replace(
    zoo.CONFIGS["opt"],
    vocab_size=4096,
    d_model=1024,
    d_ff=4096,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    max_positions=S,
)
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


def laid_out(
    layout: pj.Layout, config: pj.ModelConfig
) -> tuple[pj.Decoder, jax.Array, pj.KVCache, pj.Sparsity]:
    """Shapes and shardings of a step's arguments."""
    at = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(spec))
    empty, bf16 = abstract(config, jnp.bfloat16), jnp.bfloat16
    places = parameter_shardings(empty, layout)
    flat = {name: at(leaf.shape, bf16, places[name].spec) for name, leaf in parameters(empty).items()}
    kv = (at((B, config.num_kv_heads, S, config.head_dim), bf16, layout.cache_spec()),) * config.num_layers
    rows = at((B,), jnp.int32, PartitionSpec())
    routers = jax.eval_shape(lambda: init_routers(config, jax.random.key(0)))
    placed = [
        type(layer)(
            **{
                field.name: leaf and at(leaf.shape, bf16, layout.router_spec(field.name))
                for field in dataclasses.fields(layer)
                for leaf in [getattr(layer, field.name)]
            }
        )
        for layer in routers.layers
    ]
    routers = dataclasses.replace(routers, layers=tuple(placed))
    shards = DEVICES if layout.attention == "groups" else 1
    plan = pj.SparsityPlan(
        (1024,) * config.num_layers, (4,) * config.num_layers, neuron_shards=DEVICES, group_shards=shards
    )
    model = with_parameters(config, flat, layout=layout)
    return model, rows, pj.KVCache(kv, kv, rows), pj.Sparsity(routers, plan)


def drawing(layout: pj.Layout) -> tuple[LoopState, Rules]:
    """A state without a cache, and rules with a penalty, all cuts and log-probabilities."""
    sampler = pj.Categorical(0.8, top_k=20, top_p=0.9)
    rules = make_rules(
        jax.random.key(0), sampler=sampler, max_new_tokens=8, repetition_penalty=1.2, best=BEST
    )
    at = lambda *spec: layout.sharding(PartitionSpec(*spec))
    here = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=at())
    seen = jax.ShapeDtypeStruct((B, CONFIG.vocab_size), bool, sharding=at("data", "model"))
    rows, flags = here(jnp.int32, B), here(jnp.bool, B)
    state = LoopState(here(jnp.int32), rows, flags, flags, rows, seen, None)
    return state, jax.tree.map(lambda leaf: here(leaf.dtype, *leaf.shape), rules)


def exchanges(program: str) -> dict[str, list[int]]:
    """Elements of the results of each kind of collective in a compiled program."""
    found: dict[str, list[int]] = {}
    for kind in COLLECTIVES:
        for line in re.findall(rf"= (.+?) {kind}(?:-start)?\(", program):
            shapes = re.findall(r"\w+\[([\d,]*)\]", line)
            found.setdefault(kind, []).append(
                max(int(np.prod([int(n) for n in x.split(",") if n])) for x in shapes)
            )
    return found


@pytest.mark.parametrize(
    ("attention", "L", "kernel"), [("groups", 2, True), ("sequences", 1, True), ("sequences", 1, False)]
)
def test_step_on_four_gpus(attention, L, kernel):
    """Two sums a layer and one of the embeddings, by sequences two all-to-alls more, and of logits, only sums and each
    device's largest, for draws and log-probabilities; the cache is donated, and memory is what `costs` says. A kernel
    makes the sums of the layers, unless the devices aren't in the order that it needs."""
    devices = aot.h200s(DEVICES)[:: 1 if kernel else -1]
    mesh = Mesh(np.array(devices).reshape(1, DEVICES), ("data", "model"))
    layout, config = pj.Layout(mesh, attention=attention), dataclasses.replace(CONFIG, num_layers=L)

    def step(model, token, cache, sparsity, state, rules):
        logits, cache = pj.decode_step(model, token, cache, sparsity=sparsity, implementation="mosaic")
        with vocab_divided(layout):
            return rules.draw(logits, state), cache

    arguments = (*laid_out(layout, config), *drawing(layout))
    compiled = aot.compiled(jax.jit(step, donate_argnums=2).trace(*arguments)).compiled
    program = compiled.as_text()
    found = exchanges(program)
    sizes = found.pop("all-reduce")
    count = 1 if kernel else 2 * L + 1
    calls = re.findall(r"custom-call\(.*op_name=\"[^\"]*all_reduce_norm\.mosaic", program)
    assert len(calls) == (2 * L + 1 if kernel else 0)  # and one that connects
    assert sorted(sizes)[-count:] == [B * CONFIG.d_model] * count
    assert sorted(sizes)[-count - 1] <= 4 * B  # three sums of each row, the first beside their total
    assert len(found.pop("all-to-all", [])) == (2 * L if attention == "sequences" else 0)
    assert max(found.pop("all-gather")) <= B * DEVICES * BEST
    assert not found
    assert "mosaic_gpu" in program
    memory, each = compiled.memory_analysis(), MeshShape(model=DEVICES, attention=attention)
    cache = B * S * pj.costs.cache_bytes_per_token(config, "bfloat16") // DEVICES
    routers = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 2 for leaf in jax.tree.leaves(arguments[3])
    )
    expected = pj.costs.weights_bytes(config, "bfloat16", mesh=each) + cache + routers
    assert abs(memory.argument_size_in_bytes / expected - 1) < 0.1
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.1 * expected
