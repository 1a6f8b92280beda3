"""The token loop's compiler options: given where they may be, left out where an outer program decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.generation.overlap import overlapping_jit
from tests.kernels import aot
from tests.model import zoo

MODEL = "opt"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """XLA for CPUs takes options for GPUs, too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def prompts():
    return jnp.asarray([[5, 6, 7, 8], [9, 3, 0, 0]], jnp.int32), jnp.asarray([4, 2], jnp.int32)


def test_a_gpu_gets_the_options_and_the_same_tokens(as_on_a_gpu, monkeypatch):
    model, (tokens, lengths) = zoo.model(MODEL), prompts()
    given = []
    compile_ = jax.jit

    def watch(function, *args, **options):
        given.append(options.get("compiler_options"))
        return compile_(function, *args, **options)

    monkeypatch.setattr(jax, "jit", watch)
    double = overlapping_jit(lambda x: x * 2)
    assert given == [None, pj.OVERLAP]
    assert double(jnp.ones(3)).tolist() == [2.0] * 3
    monkeypatch.undo()
    want = pj.generate(model, tokens, lengths, max_new_tokens=5)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = pj.generate(model, tokens, lengths, max_new_tokens=5)
    np.testing.assert_array_equal(found.tokens, want.tokens)
    streamed = list(pj.stream(model, tokens, lengths, max_new_tokens=5))
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in streamed], 1), want.tokens)


def test_inside_another_jit(as_on_a_gpu):
    model, (tokens, lengths) = zoo.model(MODEL), prompts()
    want = pj.generate(model, tokens, lengths, max_new_tokens=5).tokens
    closed = jax.jit(lambda: pj.generate(model, tokens, lengths, max_new_tokens=5).tokens)
    given = jax.jit(lambda model, *batch: pj.generate(model, *batch, max_new_tokens=5).tokens)
    np.testing.assert_array_equal(closed(), want)
    np.testing.assert_array_equal(given(model, tokens, lengths), want)


def test_the_compiler_for_gpus_knows_the_options():
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=aot.h200_sharding())
    traced = jax.jit(lambda x: x @ x, out_shardings=aot.h200_sharding()).trace(x)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=dict(pj.OVERLAP))
    assert "CONCURRENT" not in compiled.as_text()  # it changes how kernels are launched, not which
    with pytest.raises(Exception, match="NONE_SUCH"):
        traced.lower(lowering_platforms=("cuda",)).compile(
            compiler_options={**pj.OVERLAP, "xla_gpu_command_buffer_scheduling_mode": "NONE_SUCH"}
        )


def test_a_draw_has_no_loop_on_a_gpu():
    """XLA makes a step with conditions one CUDA graph, but not one with a loop, which would wait for the host."""
    rows = lambda dtype: jax.ShapeDtypeStruct((2,), dtype)
    draw = lambda logits, *of_rows: pj.Categorical.of_rows(*of_rows)(logits, jax.random.key(0))
    operands = (
        jax.ShapeDtypeStruct((2, 64), jnp.float32),
        rows(jnp.float32),
        rows(jnp.int32),
        rows(jnp.float32),
    )
    text = jax.jit(draw).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.case" in text
    assert "stablehlo.while" not in text
