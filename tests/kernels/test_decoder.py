"""Whole decoding steps of published shapes, compiled for an H200: which kernels they hold, and what they copy."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest

import polarjax as pj
from bench.models import SHAPES as PUBLISHED
from bench.models import DecodeShape
from pallas_kernels import _device, record_backends
from polarjax import costs
from polarjax.generation.batch import make_rules
from polarjax.generation.token_loop import decode_loop
from polarjax.model import prompt_attention
from polarjax.model.cache import write_token
from polarjax.model.chunks import read_in_chunks
from polarjax.model.parameters import abstract
from polarjax.selection.routers import init_routers
from tests.kernels import aot

LAYERS = 3  # of the published shapes' 32: one with dense attention and two that are alike
SHAPES = {
    name: dataclasses.replace(shape, config=dataclasses.replace(shape.config, num_layers=LAYERS))
    for name, shape in PUBLISHED.items()
}
BATCH = 16
LARGE = 2**20  # elements: less than any weight matrix of a layer or any layer's cache
BFLOAT16 = 2


def routers(config: pj.ModelConfig):
    made = jax.eval_shape(lambda: init_routers(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), made)


def operands(shape: DecodeShape, batch: int = BATCH):
    """(model, cache, sparsity) as shapes."""
    config = shape.config
    cache = jax.eval_shape(
        lambda: pj.init_cache(config, batch_size=batch, capacity=shape.cache, dtype=jnp.bfloat16)
    )
    plan = shape.plan(batch, neurons=config.neuron_sparsity)
    return abstract(config, jnp.bfloat16), cache, pj.Sparsity(routers(config), plan)


def resident_bytes(shape: DecodeShape, batch: int) -> int:
    """Weights, routers and cache, by the closed formulae."""
    config = shape.config
    router = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(routers(config)))
    cache = batch * shape.cache * costs.cache_bytes_per_token(config)
    return costs.weights_bytes(config) + cache + BFLOAT16 * router


def assert_in_place(program: aot.Program, shape: DecodeShape, donated) -> None:
    """Nothing large is computed, all of the cache is written in place, and memory is what the formulae say."""
    text, memory = program.compiled.as_text(), program.compiled.memory_analysis()
    made = set(re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose|fusion)\(", text))
    made -= {",".join(map(str, leaf.shape)) for leaf in donated.k}
    assert max((math.prod(map(int, dims.split(","))) for dims in made), default=0) < LARGE
    cache = sum(leaf.size * BFLOAT16 for leaf in (*donated.k, *donated.v))
    assert memory.alias_size_in_bytes >= cache
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    assert new < BFLOAT16 * shape.config.d_model**2, "room for a copy of the smallest matrix"
    total = memory.argument_size_in_bytes + new
    assert total == pytest.approx(resident_bytes(shape, donated.k[0].shape[0]), rel=0.1)


@pytest.fixture
def hopper(monkeypatch):
    """Operations choose as they would on the GPU that the program is compiled for."""
    monkeypatch.setattr(_device, "current", lambda *arrays: _device.HOPPER)


def assert_kernels(program: aot.Program, choices, shape: DecodeShape) -> None:
    """Every layer's operations are our kernels, under their names, as often as the step was traced."""
    layers = shape.config.num_layers
    taken = [(choice.op, choice.backend) for choice in choices]
    steps, rest = divmod(taken.count(("sparse_decode_attention", "mosaic")), layers)
    assert steps > 0 and rest == 0
    assert taken.count(("sparse_mlp", "mosaic")) == (steps * layers if shape.config.neuron_sparsity else 0)
    assert not {("sparse_mlp", "xla"), ("sparse_decode_attention", "xla")} & set(taken)
    named = {op for op, _ in taken if f"{op}.mosaic" in program.compiled.as_text()}
    assert {"sparse_decode_attention"} | ({"sparse_mlp"} if shape.config.neuron_sparsity else set()) <= named


def test_a_sparse_step_of_one_sequence_reads_in_place(hopper):
    """With few groups of several heads, whose projections XLA would transpose, or multiply element by element."""
    shape = SHAPES["mistral-7b"]
    model, cache, sparsity = operands(shape, 1)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    with record_backends() as choices:
        program = aot.compile_for_h200(
            lambda model, token, cache, sparsity: pj.decode_step(model, token, cache, sparsity=sparsity),
            *(model, token, cache, sparsity),
            donate_argnames="cache",
        )
    assert_in_place(program, shape, cache)
    assert_kernels(program, choices, shape)


def test_the_token_loop_reads_in_place(hopper):
    shape = SHAPES["opt-6.7b"]
    model, cache, sparsity = operands(shape)

    def loop(model, logits, cache, sparsity):
        step = functools.partial(_step, model, sparsity)
        rules = make_rules(None, sampler=pj.Greedy(), max_new_tokens=33, stop_ids=(2,))
        return decode_loop(step, logits, cache, rules, jnp.zeros(logits.shape, bool), room=33)

    logits = jax.ShapeDtypeStruct((BATCH, shape.config.vocab_size), jnp.float32)
    with record_backends() as choices:
        program = aot.compile_for_h200(loop, model, logits, cache, sparsity, donate_argnames="cache")
    assert_in_place(program, shape, cache)
    assert_kernels(program, choices, shape)


def _step(model, sparsity, token, cache, live):
    return pj.decode_step(model, token, cache, sparsity=sparsity, live=live)


def test_reading_prompts_keeps_one_layer_at_a_time(monkeypatch):
    """The memory it takes beside weights and cache is the same for any number of layers."""
    monkeypatch.setattr(  # whose memory is cuDNN's on a GPU
        prompt_attention, "attend", lambda q, k, v, lengths, *, window: q + (k + v)[..., None, :]
    )
    rows, tokens = 8, 1024
    batch = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, tokens), (rows,))]

    def temporary(layers: int) -> int:
        config = dataclasses.replace(SHAPES["llama-2-7b"].config, num_layers=layers)
        cache = jax.eval_shape(
            lambda: pj.init_cache(config, batch_size=rows, capacity=tokens, dtype=jnp.bfloat16)
        )
        program = aot.compile_for_h200(
            functools.partial(read_in_chunks, most=2 * tokens),
            *(abstract(config, jnp.bfloat16), *batch, cache),
            donate_argnums=3,
        )
        return program.compiled.memory_analysis().temp_size_in_bytes

    assert temporary(9) < 1.1 * temporary(3)


@pytest.mark.parametrize("name", ["opt-6.7b", "llama-2-7b"])
def test_one_sequence_takes_no_more_kernels_than_two(hopper, name):
    """Norms, and the new token's key in the cache; what XLA does by itself with one row is up to three times as many."""
    shape = SHAPES[name]
    model = abstract(shape.config, jnp.bfloat16)

    def launched(rows: int) -> int:
        x = jax.ShapeDtypeStruct((rows, shape.config.d_model), jnp.bfloat16)
        cache = jax.ShapeDtypeStruct((rows, 8, 64, 128), jnp.bfloat16)
        program = aot.compile_for_h200(
            lambda model, x, cache, new, at: (
                model.layers[0].attn_norm(x) @ model.layers[0].attn.wk[...][:, 0],
                write_token(cache, new, at),
            ),
            *(model, x, cache, jax.ShapeDtypeStruct((rows, 8, 128), jnp.bfloat16)),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            donate_argnums=2,
        )
        entry = program.compiled.as_text().partition("ENTRY")[2]
        return len(re.findall(r" (?:fusion|custom-call|copy)\(", entry))

    assert launched(1) <= launched(2)
