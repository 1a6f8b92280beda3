"""The gate itself: that it sees a spill and an unknown kernel for what they are."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels._device import HOPPER
from pallas_kernels.decode_attention import mosaic
from pallas_kernels.decode_attention.tiles import Tiles
from tests.kernels import aot


def test_gate_sees_spills_and_registers():
    shapes = [(1, 1, 40, 128), (1, 1, 512, 128), (1, 1, 512, 128)]
    structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    structs.append(jax.ShapeDtypeStruct((1,), jnp.int32))
    call = functools.partial(
        mosaic.sparse_decode_attention,
        group_index=None,
        scale=1.0,
        window=9,
        device=HOPPER,
        tiles=Tiles(block=256, stages=1),
    )
    program = aot.compile_for_h200(call, *structs)
    (kernel,) = program.kernels
    assert kernel.spilled > 0
    assert kernel.registers == aot.REGISTER_LIMIT
    assert "wgmma" in kernel.ptx
    with pytest.raises(AssertionError, match="spills"):
        aot.assert_fit(program)
