"""Compiles for an H200 on a machine without a GPU, and reads what the compiler says about the kernels.

Import this before anything is compiled for a GPU (tests/kernels/conftest.py does): Mosaic GPU reads what to print once,
when it compiles its first kernel. Told to write files instead, it would write every pass's program, 40 MB a kernel.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= dict.fromkeys(
    ("MOSAIC_GPU_DUMP_RESOURCES", "MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS"), "1"
)

import jax
from jax.experimental import topologies

SMEM_LIMIT = 232448  # bytes of shared memory that one thread block may use on Hopper
REGISTER_LIMIT = 255
FIRST_TILES = {"xla_gpu_autotune_level": 0}  # of XLA's own products; else it compiles some until one fits


class Kernel(NamedTuple):
    """What ptxas and Mosaic say about one kernel; sizes in bytes. `smem` is the most that any of its program takes."""

    name: str
    registers: int
    spilled: int
    smem: int
    ptx: str


class Program(NamedTuple):
    """A compiled program and those of its kernels that this process had not compiled before."""

    compiled: Any
    kernels: tuple[Kernel, ...]


@cache
def h200s(count: int) -> list[Any]:
    """So many H200s of one host, none of which need be there."""
    target = (Path(__file__).parent / "h200.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    return topology.devices[:count]


@cache
def h200_sharding() -> jax.sharding.Sharding:
    """Everything on one H200."""
    return jax.sharding.NamedSharding(jax.sharding.Mesh(h200s(1), ("device",)), jax.sharding.PartitionSpec())


def compile_for_h200(function: Callable[..., Any], *arguments: Any, **jit_options: Any) -> Program:
    """Lowers `function` for pytrees of `jax.ShapeDtypeStruct`s and compiles it down to machine code.

    Raises what JAX, Mosaic or ptxas raise. A kernel that equals one compiled before is not reported again.
    """
    sharding = h200_sharding()
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    return compiled(jax.jit(function, out_shardings=sharding, **jit_options).trace(*structs))


def compiled(traced: Any) -> Program:
    """Lowers a traced function, whose arguments lie on devices of `h200s`, and compiles it like `compile_for_h200`."""
    with printed() as said:
        lowered = traced.lower(lowering_platforms=("cuda",))
        program = lowered.compile(compiler_options=FIRST_TILES)
    reports = re.split(r"(?m)^ptxas info .*Compile time = .*$", said[0])[:-1]
    # Lowering and compilation count on their own, so the numbers of one kernel may differ: the most any can be.
    found = re.findall(r"smem_scratch_bytes=(\d+)", said[0])
    return Program(program, tuple(_read(report, max(map(int, found))) for report in reports))


@contextlib.contextmanager
def printed() -> Iterator[list[str]]:
    """Gives, once the block has ended, what this process printed meanwhile, from Python and from C++."""
    said: list[str] = []
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        try:
            with open(1, "w", 1, "utf-8", closefd=False) as plain, contextlib.redirect_stdout(plain):
                yield said
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        said.append(file.read())


def _read(report: str, smem: int) -> Kernel:
    ptx, _, said = report.partition("\nptxas ")
    return Kernel(
        name=_only(r"\.visible \.entry (\w+?)_mosaic_gpu_kernel\(", ptx),
        registers=int(_only(r"Used (\d+) registers", said)),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        smem=smem,
        ptx=ptx,
    )


def _only(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise LookupError(f"the compiler's report holds no {pattern!r}: {text[:200]!r}")
    return found[1]


def assert_fit(program: Program, *, spilled: int = 0) -> None:
    """Fails where a kernel spills more bytes of registers to memory, or needs more shared memory than there is."""
    for kernel in program.kernels:
        assert kernel.spilled <= spilled, f"{kernel.name} spills {kernel.spilled} bytes"
        assert kernel.registers <= REGISTER_LIMIT, f"{kernel.name} uses {kernel.registers} registers"
        assert kernel.smem <= SMEM_LIMIT, f"{kernel.name} uses {kernel.smem} bytes of shared memory"
