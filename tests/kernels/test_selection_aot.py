"""The selection kernel compiled for an H200: registers, launches, transformations, names."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from bench.workloads import MODELS
from pallas_kernels import select_top_k
from pallas_kernels.selection import tiles
from tests.kernels import aot

FOUR_REGISTERS = 32  # bytes stored and loaded again


def launches(program: aot.Program) -> list[str]:
    """Top-level fusions, calls and copies of the compiled program."""
    text = program.compiled.as_text()
    entry = text[text.index("\nENTRY") :]
    return re.findall(r" (fusion|custom-call|copy|sort|pad|reduce|dynamic-slice)\(", entry)


def compiled(batch: int, n: int, k: int, *, shared: bool) -> aot.Program:
    call = functools.partial(select_top_k, k=k, shared=shared, implementation="mosaic")
    return aot.compile_for_h200(call, jax.ShapeDtypeStruct((batch, n), jnp.float32))


NEURONS = sorted({model.d_ff for model in MODELS.values()})


@pytest.mark.parametrize(
    ("n", "batch"),
    [(NEURONS[0], 1), *((n, batch) for n in NEURONS for batch in (tiles.POOL_LIMIT, 64))],
)
def test_neurons_of_the_named_models(n, batch):
    """One launch; where the batch is large, one more that pools, so that the kernel gets one row as of a batch of 1."""
    program = compiled(batch, n, n // 384 * 128 + 128, shared=True)
    (kernel,) = program.kernels
    assert kernel.name.startswith("select_top_k")
    assert "red.shared.add.u32" in kernel.ptx
    assert launches(program) == (["custom-call"] if batch <= tiles.POOL_LIMIT else ["fusion", "custom-call"])
    newer = jax.__version_info__ >= (0, 12)  # there the longest rows are four registers short
    aot.assert_fit(program, spilled=FOUR_REGISTERS if newer and n == tiles.MAX_ROW else 0)


@pytest.mark.parametrize("n", sorted({model.kv_heads for model in MODELS.values()}))
@pytest.mark.parametrize("batch", [1, 64])
def test_groups_of_the_named_models(n, batch):
    program = compiled(batch, n, max(1, n // 2 - 1), shared=False)
    assert len(program.kernels) == 1
    assert launches(program) == ["custom-call"]
    aot.assert_fit(program)


@pytest.mark.parametrize("n", [1, 3, 511, 512, 513, 1001, 4096, 4100, 20482, 32768])
def test_any_row(n):
    program = compiled(3, n, n // 2 + 1, shared=False)
    assert len(program.kernels) == 1
    assert launches(program) == (["fusion", "custom-call"] if n % 4 else ["custom-call"])
    aot.assert_fit(program)


def test_longest_rows_with_signs_spill_little():
    """Only masks of whole texts meet them; pooled rows of that length don't spill."""
    program = compiled(3, tiles.MAX_ROW, 12345, shared=False)
    assert len(program.kernels) == 1
    aot.assert_fit(program, spilled=FOUR_REGISTERS)


def test_layers_share_one_kernel_named_in_profiles():
    def layers(scores):
        return [select_top_k(one, 129, shared=True, implementation="mosaic") for one in scores]

    program = aot.compile_for_h200(layers, [jax.ShapeDtypeStruct((2, 2048), jnp.float32)] * 4)
    assert len(program.kernels) == 1
    assert "select_top_k.mosaic" in program.compiled.as_text()


def test_vmap_and_scan():
    call = functools.partial(select_top_k, k=77, shared=True, implementation="mosaic")
    stacked = jax.ShapeDtypeStruct((5, 2, 2048), jnp.float32)
    batched = aot.compile_for_h200(jax.vmap(call), stacked)
    assert launches(batched) == ["custom-call"]
    looped = aot.compile_for_h200(lambda xs: lax.scan(lambda c, x: (c, call(x)), 0, xs)[1], stacked)
    for program in (batched, looped):
        assert program.compiled.out_info.shape == (5, 77)
        aot.assert_fit(program)
