"""The selective MLP's kernels of the named workloads, compiled for an H200: no spills, shared memory in bounds."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from bench.check_sparse_mlp import brief
from bench.mlp_runs import MlpCase
from bench.workloads import BATCHES, DENSITIES, MLP_MODELS, MODELS
from pallas_kernels import sparse_mlp
from pallas_kernels._device import HOPPER
from pallas_kernels.sparse_mlp.tiles import BATCHES as PADDED
from pallas_kernels.sparse_mlp.tiles import Tiles, heuristic
from tests.covering import covering_pairs
from tests.kernels import aot


@functools.cache
def chosen(case: MlpCase) -> Tiles:
    model = case.model
    batch = min(case.batch, PADDED[-1])
    return heuristic(batch, model.d_model, HOPPER, selected=case.selected, gated=model.gated)


def named_kernels() -> list[MlpCase]:
    """Of the named workloads, those with most neurons for their tiles, enough for every pair of the tiles' sizes."""
    largest: dict[tuple[Tiles, bool], MlpCase] = {}
    for model, batch, density in itertools.product(MODELS.values(), BATCHES, DENSITIES):
        case = MlpCase(model, min(batch, PADDED[-1]), density)
        kind = (chosen(case), model.gated)
        if kind not in largest or case.selected > largest[kind].selected:
            largest[kind] = case
    return covering_pairs(
        largest.values(), lambda case: (chosen(case).batch, chosen(case).groups, case.model.gated)
    )


LARGE = MlpCase(MODELS["opt-6.7b"], 300, 1.0)


@pytest.mark.parametrize(
    "case",
    [case for case in named_kernels() if (chosen(case), case.model.gated) != (chosen(LARGE), False)],
    ids=lambda case: f"{case}-{brief(chosen(case))}".replace(" ", "-"),
)
def test_compiles_for_h200(case):
    compiled(case)


def compiled(case: MlpCase) -> aot.Program:
    """The program of a call, which holds one kernel that fits."""
    model = case.model
    # One neuron less than the model has: a kernel that was compiled before is not reported again.
    weight = jax.ShapeDtypeStruct((model.d_ff - 1, model.d_model), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((case.batch, model.d_model), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((case.selected,), jnp.int32)
    optional = (
        {"w_gate": weight} if model.gated else {"b_up": jax.ShapeDtypeStruct(weight.shape[:1], x.dtype)}
    )
    act = {"activation": model.activation, "threshold": model.threshold}
    call = functools.partial(sparse_mlp, **act, implementation="mosaic")
    program = aot.compile_for_h200(
        lambda x, up, down, index, optional: call(x, up, down, index, **optional),
        *(x, weight, weight, index, optional),
    )
    (kernel,) = program.kernels
    assert kernel.name.startswith("sparse_mlp_up_down")
    assert "wgmma.mma_async" in kernel.ptx
    assert "cp.async.bulk.shared::cta.global" in kernel.ptx
    assert kernel.smem <= chosen(case).smem_bytes
    assert ("0f3C23D70A" in kernel.ptx) == (
        model.threshold == 0.01
    )  # its bits, as a constant of the comparison
    aot.assert_fit(program)
    return program


SHAPES = [  # what no named workload has: a width that only narrower columns divide, and so few neurons that blocks
    (PADDED[-1], 5248, 1500),  # share a tile; smaller batches need fewer registers and less memory
    (64, 4096, 500),
]


@pytest.mark.parametrize(("batch", "d_model", "selected"), SHAPES)
def test_widths_fit(batch, d_model, selected):
    x, weight = (jax.ShapeDtypeStruct((rows, d_model), jnp.bfloat16) for rows in (batch, 9999))
    index = jax.ShapeDtypeStruct((selected,), jnp.int32)
    program = aot.compile_for_h200(
        lambda x, up, down, index: sparse_mlp(x, up, down, index, implementation="mosaic"),
        *(x, weight, weight, index),
    )
    (kernel,) = program.kernels
    assert kernel.smem <= heuristic(batch, d_model, HOPPER, selected=selected).smem_bytes
    aot.assert_fit(program)


def test_few_gated_neurons_with_a_threshold_fit():
    """So few that several blocks share a tile, which has 32 rows."""
    compiled(MlpCase(MLP_MODELS["prosparse-llama-2-7b"], 32, 0.1))


def test_large_batches_run_one_piece_after_the_other():
    """Two fused kernels that ran at once could wait for each other forever; weights are not copied into the loop."""
    program, model = compiled(LARGE), LARGE.model
    text = program.compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 1
    entry = text[text.index("\nENTRY") :]
    assert " while(" in entry and "mosaic_gpu_v2" not in entry
    assert not re.search(rf"= bf16\[{model.d_ff - 1},{model.d_model}\]\S* copy\(", text)
