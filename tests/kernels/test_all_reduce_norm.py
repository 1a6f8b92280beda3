"""Sums over GPUs: what the kernel can't do, and how it compiles for H200s. Results are checked on GPUs, by the bench."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import Link, all_reduce_norm, connect
from pallas_kernels.all_reduce_norm.problem import MAX_RECEIVED, Problem
from pallas_kernels.all_reduce_norm.reference import reference
from tests.kernels import aot
from tests.tolerances import assert_close


def mesh_of(devices: list[Any], data: int = 1) -> Mesh:
    return Mesh(np.array(devices).reshape(data, -1), ("data", "model"))


def linked(mesh: Mesh, rows: int = 16, width: int = 4096, implementation: str | None = "mosaic") -> Link:
    after = jnp.zeros((1,), jnp.int32)
    return connect(after, mesh, "model", rows=rows, width=width, implementation=implementation)


@pytest.mark.parametrize(
    ("width", "warpgroups", "vectors"), [(1024, 1, 1), (5120, 5, 1), (9216, 3, 3), (12288, 6, 2)]
)
def test_threads_share_a_row(width, warpgroups, vectors):
    problem = Problem(1, width, 2, "rms", 1e-5, False, False, summands=0)
    assert (problem.warpgroups, problem.vectors) == (warpgroups, vectors)
    assert problem.threads * problem.vectors * 8 == width


def test_what_the_kernel_cannot_do():
    two, three = aot.h200s(2), aot.h200s(3)
    cases = {
        "multiple of 1024 elements; got 4000": lambda: linked(mesh_of(two), width=4000),
        "2 to 8 devices; got 1": lambda: linked(mesh_of(two, data=2)),
        f"up to {MAX_RECEIVED // 2} elements; got {MAX_RECEIVED}": lambda: linked(
            mesh_of(two), MAX_RECEIVED // 4096
        ),
        "devices 0 to 1, in this order": lambda: linked(mesh_of(two[::-1])),
        "devices 0 to 1, in": lambda: linked(mesh_of(three[1:])),
        "needs an NVIDIA Hopper GPU; got cpu": lambda: linked(mesh_of(two), implementation=None),
    }
    for words, call in cases.items():
        with pytest.raises(NotImplementedError, match=words):
            call()


def test_bad_arguments():
    x, scale = jnp.zeros((16, 4096), jnp.bfloat16), jnp.ones((4096,), jnp.bfloat16)
    link = Link(jnp.zeros((2 * 2 * x.size,), jnp.uint32), jnp.zeros((3, 2), jnp.uint32))
    call: Any = functools.partial(all_reduce_norm, kind="rms", eps=1e-5)
    cases = {
        r"must be \[B D\]; got \[8, 4096\]": lambda: call(x[:8], x, scale, link, 1),
        "shift must be bfloat16; got float32": lambda: call(x, x, scale.astype(jnp.float32), link, 1),
        "update must be bfloat16, or float32 with summands; got float32": lambda: call(
            x.astype(jnp.float32), x, scale, link, 1
        ),
        r"must be \[B D\]; got \[2, 8, 4096\]": lambda: call(jnp.zeros((2, 8, 4096)), x, scale, link, 1),
        r"must be \[D\]; got \[16\], D 4096": lambda: call(x, x, scale, link, 1, bias=scale[:16]),
        "has 1024 words of memory; this sum needs 262144": lambda: call(
            x, x, scale, link._replace(memory=link.memory[:1024]), 1
        ),
    }
    for words, run in cases.items():
        with pytest.raises(ValueError, match=words):
            run()


def test_oracle_is_the_layer_norm_of_the_sum():
    """Against the definition in float64."""
    rng = np.random.default_rng(0)
    updates, x = rng.standard_normal((3, 4, 64)), rng.standard_normal((4, 64))
    scale, bias, shift = rng.standard_normal((3, 64))
    y = x + updates.sum(0) + bias
    normed = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) * scale + shift
    to = lambda value: jnp.asarray(value, jnp.float32)
    options: Any = {"bias": to(bias), "shift": to(shift), "kind": "layer", "eps": 1e-5}
    found = reference(to(updates), to(x), to(scale), **options)
    for each, right in zip(found, (y, normed), strict=True):
        assert_close(each, right, "kernel")


@pytest.mark.parametrize(
    ("devices", "data", "rows", "width", "kind", "summands"),
    [(2, 1, 130, 4096, "rms", 0), (4, 2, 7, 9216, "layer", 8)],
)
def test_compiles_for_h200s(devices, data, rows, width, kind, summands):
    """One kernel for all sums, in registers, that needs no metadata from XLA; only the one that connects does."""
    mesh = mesh_of(aot.h200s(devices), data)

    def run(x, scale):
        link = connect(x, mesh, "model", rows=rows, width=width, implementation="mosaic")
        more = {"bias": scale, "shift": scale} if kind == "layer" else {}
        normed = x
        for number in (1, 2, 3):
            part = jnp.stack([normed.astype(jnp.float32)] * summands) if summands else normed
            x, normed = all_reduce_norm(part, x, scale, link, number, kind=kind, eps=1e-5, **more)
        return x, normed

    spread = jax.shard_map(
        run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    at = lambda *shape: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    program = aot.compiled(jax.jit(spread).trace(at(rows, width), at(width)))
    aot.assert_fit(program)
    names = sorted(kernel.name for kernel in program.kernels)
    assert names == ["all_reduce_norm", "connect"]
    text = program.compiled.as_text()
    assert text.count("uses_xla_collective_metadata = true") == 1
    assert text.count("uses_xla_collective_metadata = false") == 3
