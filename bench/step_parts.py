"""What the time of a decoding step goes to on a GPU: attention, projections, neurons, routers, the head, the rest.

    python3 -m bench.step_parts [--models opt-6.7b llama-2-7b] [--batches …]

The loop of bench_decode is compiled without CUDA graphs, so that the profiler says which instruction of the program
each kernel belongs to; the instruction's name says in which part of the model it is (the `jax.named_scope`s of
polarjax/model). A kernel that computes something of two parts counts as the one of its last operation. Columns are
sums of kernel times per step; with CUDA graphs, kernels of different parts overlap, and gaps are shorter. If the
variable OUT is set, JSON lines are written to that folder.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import polarjax as pj
from bench import bench_decode, report, timing
from bench.bench_decode import STEPS
from bench.models import SHAPES, DecodeShape, shape_of
from bench.program_parts import REST, SCOPES, instruction_parts
from bench.random_models import random_model, routers

REPEATS = 3
NO_GRAPHS = {"xla_gpu_enable_command_buffer": "", "xla_gpu_graph_min_graph_size": 1_000_000}
UNKNOWN = "unknown"
PARTS = (*SCOPES.values(), REST, UNKNOWN)
COLUMNS = ("case", "kind", "total_ms", *PARTS)


def by_part(
    seen: Iterable[timing.Event], parts: Mapping[str, str], steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds and kernels of each part per step.

    Fusions have the instruction's name with _ for . and -, which serves where the profiler doesn't say the instruction.
    """
    plain = {_plain(name): part for name, part in parts.items()}
    found: dict[str, list[float]] = {}
    for event in seen:
        part = parts.get(event.op) or plain.get(_plain(event.op)) or plain.get(_plain(event.name), UNKNOWN)
        found.setdefault(part, []).append(event.length / 1e6)
    found = {part: found[part] for part in PARTS if part in found}
    return {p: sum(of) / steps for p, of in found.items()}, {p: len(of) / steps for p, of in found.items()}


def _plain(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def table(names: list[str], batches: list[int] | None, seconds: float) -> Iterator[dict[str, Any]]:
    """One row per cell, dense and sparse; stops early when time runs out."""
    deadline = time.monotonic() + seconds
    for shape in map(shape_of, names):
        made, model = routers(shape.config), random_model(shape.config)
        for batch in bench_decode.fitting(shape, batches):
            cache = bench_decode.filled_cache(shape.config, batch, shape.cache)
            found = list(bench_decode.kinds(shape, batch, made, xla=False))
            for kind, sparsity, options in (found[0], found[-1]):
                if time.monotonic() > deadline:
                    print("out of time", flush=True)
                    return
                loop = bench_decode.lowered(shape, batch, sparsity, options, NO_GRAPHS).compile()
                row, cache = _row(shape, batch, loop, model, cache, sparsity)
                yield {**row, "kind": kind}
            del cache
        del model


def _row(
    shape: DecodeShape, batch: int, loop: Any, model: pj.Decoder, cache: pj.KVCache, sparsity: Any
) -> tuple[dict[str, Any], pj.KVCache]:
    token, start = jnp.zeros((batch,), jnp.int32), jnp.array(cache.length)
    kept = [cache]

    def run() -> jax.Array:
        last, after = loop(model, token, kept.pop(), sparsity, jnp.array(start))
        kept.append(pj.KVCache(after.k, after.v, start))
        return last

    jax.block_until_ready(run())
    seen = timing.events(run, REPEATS)
    spent, count = by_part(seen, instruction_parts(loop.as_text()), REPEATS * STEPS)
    row = {"case": f"{shape.name} B{batch} S{shape.cache}", "total_ms": sum(spent.values()), **spent}
    return row | {"kernels": count}, kept.pop()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["opt-6.7b", "llama-2-7b"], choices=tuple(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, help="instead of those of the shape")
    parser.add_argument("--seconds", type=float, default=480, help="time limit")
    args = parser.parse_args()
    timing.require_gpu()
    rows = table(args.models, args.batches, args.seconds)
    report.measure(rows, report.provenance(), "step_parts.jsonl", COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
