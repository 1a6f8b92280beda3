"""The token loop's compiler options: given where they may be, left out where an outer program decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.generation.overlap import MANY_ROWS, overlapping_jit
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
    double = overlapping_jit(lambda x: x * 2, rows=lambda x: x)
    assert given == [None, pj.loop_options(1), pj.loop_options(MANY_ROWS)]
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


@pytest.mark.parametrize("rows", [1, MANY_ROWS - 1, MANY_ROWS, 64])
def test_many_rows_have_options_of_their_own(as_on_a_gpu, rows):
    """Whether a call takes the program of few rows or that of many."""
    double = overlapping_jit(lambda x: x * 2, rows=lambda x: x)
    chosen = double._of((jnp.ones(rows),), {})
    assert chosen is (double._few if rows < MANY_ROWS else double._many)
    assert (pj.loop_options(rows) == pj.OVERLAP) == (rows < MANY_ROWS)


def test_several_devices_have_the_options_of_few_rows(as_on_a_gpu):
    double = overlapping_jit(lambda x: x * 2, rows=lambda x: x)
    rows = jax.NamedSharding(jax.sharding.Mesh(aot.h200s(2), ("data",)), jax.P("data"))
    x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=rows)
    assert double._of((x,), {}) is double._few


@pytest.mark.parametrize("rows", [0, 2.5, True, "many"])
def test_a_batch_size_is_a_whole_number(rows):
    with pytest.raises(pj.InputError, match="batch_size"):
        pj.loop_options(rows)


def test_the_compiler_for_gpus_knows_the_options():
    """And makes a product of many rows whole, one of few in parts that another kernel adds up."""
    kernels = {}
    for rows in (16, MANY_ROWS):
        x, w = (
            jax.ShapeDtypeStruct((n, 4096), jnp.bfloat16, sharding=aot.h200_sharding()) for n in (rows, 4096)
        )
        traced = jax.jit(lambda x, w: x @ w, out_shardings=aot.h200_sharding()).trace(x, w)
        text = (
            traced.lower(lowering_platforms=("cuda",))
            .compile(compiler_options=pj.loop_options(rows))
            .as_text()
        )
        assert "CONCURRENT" not in text  # it changes how kernels are launched, not which
        kernels[rows] = sum(" fusion(" in line or "custom-call(" in line for line in text.splitlines())
    assert kernels == {16: 2, MANY_ROWS: 1}
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
