"""Every operation in scan, vmap, shard_map and export: plain XLA is run, the Hopper kernels are lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.sharding import PartitionSpec

from pallas_kernels import select_top_k, sparse_decode_attention, sparse_mlp
from pallas_kernels._device import HOPPER
from pallas_kernels.sparse_mlp import xla
from pallas_kernels.sparse_mlp.batching import batchable
from pallas_kernels.sparse_mlp.mosaic import launch as mosaic
from pallas_kernels.sparse_mlp.tiles import Tiles
from tests.tolerances import assert_close

MOSAIC = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
DTYPE = jnp.bfloat16


@functools.cache
def draw(seed: int, *shape: int) -> jax.Array:
    """Random values, the same for every call: constants of the programs."""
    with jax.ensure_compile_time_eval():
        return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(DTYPE))


def mlp(x, **options):
    index = jnp.asarray([3, 200, -1, 17, 16, 0, 255, 3], jnp.int32)
    return sparse_mlp(x, draw(1, 256, 128), draw(2, 256, 128), index, b_up=draw(3, 256), **options)


def attention(q, **options):
    rows = q.shape[0]
    index, lengths = jnp.asarray([[2, 0]] * rows, jnp.int32), jnp.full((rows,), 70, jnp.int32)
    cache = [draw(seed, rows, 3, 72, 64) for seed in (4, 5)]
    return sparse_decode_attention(q, *cache, lengths, index, scale=0.1, **options)


def selection(scores, **options):
    return select_top_k(scores, 40, shared=False, **options)


CALLS = {
    "sparse_mlp": (mlp, draw(6, 2, 128)),
    "sparse_decode_attention": (attention, draw(7, 2, 3, 2, 64)),
    "select_top_k": (selection, draw(8, 2, 600)),
}


def in_jit(call):
    return call


def in_scan(call):
    return lambda x: lax.scan(lambda carry, one: (carry, call(one)), 0, jnp.stack([x, x]))[1][1]


def in_vmap(call):
    return lambda x: jax.vmap(call)(jnp.stack([x, x]))[1]


def in_shard_map(call):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    return jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


TRANSFORMATIONS = [in_jit, in_scan, in_vmap, in_shard_map]


@functools.cache
def alone(op: str) -> jax.Array:
    """What plain XLA makes of an operation's operand without any transformation."""
    call, x = CALLS[op]
    return call(x, implementation="xla")


@pytest.mark.parametrize("transform", TRANSFORMATIONS)
@pytest.mark.parametrize("op", CALLS)
def test_xla_runs_and_is_exported(op, transform):
    call, x = CALLS[op]
    call, want = functools.partial(call, implementation="xla"), alone(op)
    exported = export.export(jax.jit(transform(call)))(x)
    made = export.deserialize(exported.serialize()).call(x)
    assert made.dtype == want.dtype
    assert_close(made.astype(jnp.float32), want.astype(jnp.float32), "kernel", DTYPE)


@pytest.mark.parametrize("transform", TRANSFORMATIONS)
@pytest.mark.parametrize("op", CALLS)
def test_mosaic_is_exported_for_a_gpu(op, transform):
    """Exported, written, read back: one kernel, named after the operation, and no other implementation of it."""
    call, x = CALLS[op]
    inside = transform(functools.partial(call, implementation="mosaic"))
    exported = export.export(jax.jit(inside), platforms=["cuda"], disabled_checks=MOSAIC)(x)
    read = export.deserialize(exported.serialize())
    assert read.platforms == ("cuda",)
    assert [aval.shape for aval in read.out_avals] == [alone(op).shape]
    text = read.mlir_module()
    assert text.count("custom_call @mosaic_gpu") == 1
    if transform in (in_jit, in_vmap):  # names in loops: test_decoder.py
        lowered = jax.jit(inside).trace(x).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
        assert f"{op}.mosaic" in lowered
    with pytest.raises(ValueError, match="cuda"):
        read.call(x)


# ---- the selective MLP under vmap: its thread blocks wait for all others of a launch


def counted(call):
    """What `call` was traced with, and a function that does what it does."""
    seen: list[tuple[int, ...]] = []

    def traced(x, index, weights):
        seen.append(x.shape)
        return call(x, index=index, **weights, activation="relu")

    return seen, batchable(traced)


def operands(size: int):
    """x [size 5 128], index [size 3], weights of `size` layers."""
    index = jnp.asarray([[7, -1, 20], [0, 89, 4], [3, 2, 1], [5, 5, -1]], jnp.int32)[:size]
    weights = {"w_up": draw(2, size, 90, 128) / 8, "w_down": draw(3, size, 90, 128)}
    return draw(1, size, 5, 128), index, weights


@pytest.mark.parametrize(
    "mapped", [(0, None, None), (None, 0, None), (0, 0, None), (None, None, 0), (0, 0, 0)]
)
def test_vmap_of_the_mlp_is_one_call_or_one_after_the_other(mapped):
    size = 4
    every = operands(size)
    pick = lambda i: tuple(jax.tree.map(lambda a: a[i], part) for part in every)
    given = tuple(
        part if axis == 0 else pick(1)[n] for n, (part, axis) in enumerate(zip(every, mapped, strict=True))
    )
    seen, call = counted(xla.sparse_mlp)
    made = jax.vmap(call, in_axes=mapped)(*given)
    assert ((20, 128) in seen) == (mapped == (0, None, None))
    for i in range(size):
        x, index, weights = (pick(i)[n] if axis == 0 else pick(1)[n] for n, axis in enumerate(mapped))
        want = xla.sparse_mlp(x, index=index, **weights, activation="relu")
        assert_close(made[i].astype(jnp.float32), want.astype(jnp.float32), "kernel", DTYPE)


def test_vmap_of_vmap_of_the_mlp():
    x, index, weights = operands(4)
    one = jax.tree.map(lambda a: a[0], weights)
    seen, call = counted(xla.sparse_mlp)
    inner = jax.vmap(call, in_axes=(0, None, None))
    made = jax.vmap(inner, in_axes=(0, 0, None))(jnp.stack([x, x, x, x])[:, :2], index, one)
    assert made.shape == (4, 2, 5, 128)
    assert (10, 128) in seen
    want = xla.sparse_mlp(x[1], index=index[2], **one, activation="relu")
    assert_close(made[2, 1].astype(jnp.float32), want.astype(jnp.float32), "kernel", DTYPE)


@pytest.mark.parametrize("mapped", [(0, None, None), (0, 0, None)])
def test_vmap_of_the_kernel_interpreted(mapped):
    interpreter.reset_gpu_interpret_mode_state()
    tiles = Tiles(
        batch=16, groups=1, cols=128, stages=2, x_cols=64, x_slots=4, blocks=3, copy="rows", fused=False
    )
    kernel = functools.partial(mosaic.sparse_mlp, device=HOPPER, tiles=tiles, interpret=True)
    _, call = counted(kernel)
    x, index, weights = operands(2)
    weights = jax.tree.map(lambda a: a[0], weights)
    made = jax.block_until_ready(
        jax.vmap(call, in_axes=mapped)(x, index if mapped[1] == 0 else index[0], weights)
    )
    for i in range(2):
        rows = index[i if mapped[1] == 0 else 0]
        want = xla.sparse_mlp(x[i], index=rows, **weights, activation="relu")
        assert_close(made[i].astype(jnp.float32), want.astype(jnp.float32), "kernel", DTYPE)
    assert np.isfinite(np.asarray(made, np.float32)).all()
