"""The time of a step by part: what the compiler's text says about each instruction, and sums over a profile."""

import jax
import numpy as np
import pytest

from bench import program_parts, step_parts
from bench.program_parts import REST, instruction_parts, part_of
from bench.timing import Event
from tests.model import zoo

PROGRAM = """HloModule jit_step

%merged (parameter_0.1: bf16[4], parameter_1.1: bf16[4]) -> bf16[8] {
  %parameter_0.1 = bf16[4]{0} parameter(0)
  %parameter_1.1 = bf16[4]{0} parameter(1)
  ROOT %dot.1 = bf16[8]{0} dot(%parameter_0.1, %parameter_1.1), metadata={scheduling_name="dot.1"}
}

%writes (parameter_0.2: bf16[9], parameter_1.2: bf16[8]) -> bf16[9] {
  %parameter_0.2 = bf16[9]{0} parameter(0)
  %parameter_1.2 = bf16[8]{0} parameter(1)
  %slice.1 = bf16[8]{0} slice(%parameter_1.2), metadata={op_name="jit(step)/layer_0/projections/dot_general"}
  ROOT %scatter.1 = bf16[9]{0} scatter(%parameter_0.2, %slice.1), metadata={op_name="jit(step)/layer_0/append/scatter"}
}

ENTRY %main (p0: bf16[4], p1: bf16[9]) -> bf16[9] {
  %p0 = bf16[4]{0} parameter(0), metadata={op_name="model.embed"}
  %p1 = bf16[9]{0} parameter(1)
  %gemm_fusion_dot.1 = bf16[8]{0} fusion(%p0, %p0), kind=kCustom, calls=%merged
  %top.2 = s32[2]{0} custom-call(%p0), metadata={op_name="jit(step)/layer_0/routers/top_k"}
  ROOT %input-scatter.3 = bf16[9]{0} fusion(%p1, %gemm_fusion_dot.1), kind=kInput, calls=%writes
}
"""


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(step)/layer_3/mlp/sparse_mlp.mosaic/dot_general", "neurons"),
        ("jit(step)/layer_3/sparse_decode_attention.xla/dot_general", "attention"),
        ("jit(step)/layer_0/routers/select_top_k.mosaic/call", "routers and selection"),
        ("jit(step)/layer_3/add", REST),
        ("", REST),
    ],
)
def test_part_of_a_path(path, part):
    assert part_of(path) == part


def test_products_without_a_path_belong_to_what_uses_them():
    parts = instruction_parts(PROGRAM)
    assert parts["gemm_fusion_dot.1"] == "projections"
    assert parts["input-scatter.3"] == "cache append"
    assert parts["top.2"] == "routers and selection"


def test_every_part_of_a_real_step_is_named():
    """A scope that the model no longer enters would silently become part of the rest."""
    model, name = zoo.model("opt"), "opt"
    given = (model, np.zeros(3, np.int32), zoo.empty_cache(model, 3))
    step = jax.jit(zoo.pj.decode_step).lower(*given, sparsity=zoo.per_row(name))
    found = set(instruction_parts(step.compile().as_text()).values())
    assert found == {*program_parts.SCOPES.values(), REST}


def test_sums_by_part():
    """By the instruction that the profiler names, or by the kernel's own name, which has _ for . and -."""
    seen = [
        Event(0, 3e6, "nvjet_tst_64x8", "gemm_fusion_dot.1"),
        Event(1, 1e6, "input_scatter_3"),
        Event(2, 2e6, "gemm_fusion_dot_1"),
        Event(3, 4e6, "memset"),
    ]
    spent, kernels = step_parts.by_part(seen, instruction_parts(PROGRAM), steps=2)
    assert spent == {"projections": 2.5, "cache append": 0.5, "unknown": 2.0}
    assert kernels == {"projections": 1.0, "cache append": 0.5, "unknown": 0.5}
    assert list(spent) == [part for part in step_parts.PARTS if part in spent]
