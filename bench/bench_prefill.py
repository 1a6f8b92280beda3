"""Reading prompts on a GPU: checks cuDNN's attention against plain operations first, then measures TFLOP/s and memory.

    python3 -m bench.bench_prefill check            attention of prompts and its gradients, against float32
    python3 -m bench.bench_prefill table [--models] published shapes with random weights

TFLOP/s count the products of the layers (2 per weight and token), the causal half of attention, and the head at one
position a row. Prompts are read as `generate` reads them. `pct_of_matmul` compares them with a large bfloat16 product
in the same run. `temporary_bytes` is what the compiler plans beside weights and cache. If the variable OUT is set, JSON
lines are written to that folder.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import polarjax as pj
from bench import report, timing
from bench.models import SHAPES
from bench.random_models import random_model
from polarjax.generation.generate import read_prompts
from polarjax.model.parameters import abstract, parameters
from polarjax.model.prompt_attention import attend

COLUMNS = ("case", "ms", "tokens_per_s", "tflops", "pct_of_matmul", "temporary_bytes")
CASES = ((1, 512), (1, 2048), (4, 2048), (16, 1024), (16, 1920), (16, 3968), (48, 3968))
LIMIT = 1.5  # how many times the error of plain operations in the same dtype is allowed


def run_checks() -> bool:
    """Prints one line per case: how far attention and its gradients are from plain operations in float32."""
    widths, windows = ((2, 8), (7, 64), (130, 80), (512, 128)), (None, 5)
    cases = itertools.product(widths, windows, ((9, 1), (2, 4)), (jnp.bfloat16, jnp.float16))
    return all(list(itertools.starmap(_check, cases)))


def _check(sizes, window, heads, dtype) -> bool:
    (T, H), (K, G), B = sizes, heads, 3
    keys = jax.random.split(jax.random.key(T), 4)
    shapes = ((B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H))
    q, k, v, weight = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    lengths = jnp.asarray([T, max(1, T // 2), 1], jnp.int32)
    valid = (jnp.arange(T)[None] < lengths[:, None])[..., None, None, None]

    def run(q, k, v, platform):
        with jax.default_device(jax.devices(platform)[0]):
            moved = jax.device_put((q, k, v, lengths, weight, valid))
            total = lambda q, k, v, lengths, weight, valid: (
                (jnp.where(valid, (out := attend(q, k, v, lengths, window=window)) * weight, 0))
                .astype(jnp.float32)
                .sum(),
                jnp.where(valid, out, 0),
            )
            (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*moved)
            return [np.asarray(each, np.float64) for each in (out, *grads)]

    wide = lambda a: a.astype(jnp.float32)
    exact = run(wide(q), wide(k), wide(v), "cpu")
    ours, plain = run(q, k, v, "gpu"), run(q, k, v, "cpu")
    far = lambda made: [
        np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9) for a, b in zip(made, exact, strict=True)
    ]
    errors, allowed = far(ours), far(plain)
    fine = all(
        error <= max(LIMIT * limit, 2e-2 if dtype == jnp.bfloat16 else 3e-3)
        for error, limit in zip(errors, allowed, strict=True)
    )
    print(
        f"{'ok  ' if fine else 'FAIL'} T{T} H{H} K{K} G{G} window {window} {jnp.dtype(dtype)}: out, dq, dk, dv "
        f"{' '.join(f'{each:.1e}' for each in errors)}; plain {' '.join(f'{each:.1e}' for each in allowed)}",
        flush=True,
    )
    return fine


def flops(config: pj.ModelConfig, batch: int, length: int) -> float:
    """Operations to read `batch` prompts of `length` tokens; see the module's docstring."""
    shapes = parameters(abstract(config, jnp.bfloat16))
    weights = sum(leaf.size for name, leaf in shapes.items() if name.startswith("layers.") and leaf.ndim > 1)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length * (length + 1)
    head = 2 * config.vocab_size * config.d_model
    return batch * (2.0 * weights * length + attention + head)


def matmul_flops(size: int = 8192) -> float:
    """Operations per second of a bfloat16 product of random [size, size] matrices."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.dot)
    return 2.0 * size**3 / timing.time_call(lambda: product(a, b), 1).device


def table(names: list[str], seconds: float, rate: float) -> Iterator[dict[str, Any]]:
    """One row per case; stops early when time runs out."""
    deadline = time.monotonic() + seconds
    for name in names:
        config = SHAPES[name].config
        model = random_model(config)
        for batch, length in CASES:
            if length > config.max_positions or time.monotonic() > deadline:
                continue
            yield _row(name, model, batch, length, rate)


def _row(name: str, model: pj.Decoder, batch: int, length: int, rate: float) -> dict[str, Any]:
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, model.config.vocab_size, jnp.int32)
    lengths = jnp.full((batch,), length, jnp.int32)
    run = read_prompts.lower(model, tokens, lengths, capacity=length + 8).compile()
    temporary = run.memory_analysis().temp_size_in_bytes  # pyrefly: ignore[missing-attribute]
    times = []
    for _ in range(4):
        started = time.perf_counter()
        jax.block_until_ready(run(model, tokens, lengths))
        times.append(time.perf_counter() - started)
    median = float(np.median(times[1:]))
    made = flops(model.config, batch, length) / median
    return {
        "case": f"{name} B{batch} T{length}",
        "ms": median * 1e3,
        "spread_ms": 1e3 * (max(times[1:]) - min(times[1:])),
        "tokens_per_s": batch * length / median,
        "tflops": made / 1e12,
        "pct_of_matmul": 100 * made / rate,
        "temporary_bytes": temporary,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "table"))
    parser.add_argument("--models", nargs="+", default=["opt-6.7b", "llama-2-7b"], choices=tuple(SHAPES))
    parser.add_argument("--seconds", type=float, default=120, help="time limit for the table")
    args = parser.parse_args()
    timing.require_gpu()
    if "check" in args.verbs and not run_checks():
        print("wrong results, so no speed is reported", file=sys.stderr)
        return 1
    if "table" in args.verbs:
        rate = matmul_flops()
        rows = table(args.models, args.seconds, rate)
        report.measure(rows, report.provenance(matmul_tflops=rate / 1e12), "prefill.jsonl", COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
