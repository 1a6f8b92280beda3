"""Whole decoding steps on a GPU: checks tokens first, then measures tokens per second.

    python3 -m bench.bench_decode check             greedy tokens of the bundled models, our kernels against XLA
    python3 -m bench.bench_decode table [--models]  published shapes with random weights, dense and sparse
    python3 -m bench.bench_decode table --devices 1 2  the same on several devices, beside one

A row's time is that of one step in a compiled loop of many, which is called a few times without waiting. Its floor is
the time that moving `costs.decode_bytes` takes at the bandwidth of a copy measured in the same run. Set
XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for the table: the largest cache takes nearly all of an H200; cells that don't fit
are left out. OPT-66B and LLaMA-3.1-70B are single layers with next to no vocabulary. `--models tiny` runs on any
device. If the variable OUT is set, JSON lines are written to that folder. bench_torch measures dense steps of the
same shapes in PyTorch.
"""

import argparse
import functools
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import polarjax as pj
from bench import report, timing
from bench.models import LARGE_SHAPES, SHAPES, TINY_SHAPE, DecodeShape, shape_of
from bench.random_models import normal, random_model, routers
from checkpoints_convert import convert_checkpoint
from pallas_kernels import record_backends
from polarjax import memory
from polarjax.demo.run import PROMPTS
from polarjax.model.mesh_shape import ONE_DEVICE, MeshShape
from polarjax.model.parameters import abstract
from polarjax.selection.plans import uniform_groups
from polarjax.selection.routers import Routers
from polarjax.selection.selectors import Sparsity, Static

ASSETS = Path(pj.__file__).parent / "assets"
STEPS, CALLS, REPEATS = 16, 4, 4
NEW = 48
COLUMNS = ("case", "kind", "ms_per_step", "tokens_per_s", "speedup_vs_dense", "pct_of_floor", "compile_s")


# ---- correctness -----------------------------------------------------------------------------------------


@functools.cache
def bundled(name: str, dtype: str) -> pj.Bundle:
    """A bundled model with its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        convert_checkpoint(ASSETS / name, Path(folder) / name)
        return pj.load(Path(folder) / name, dtype=jnp.dtype(dtype))


def run_checks() -> bool:
    """Prints one line per case: whether our kernels generate the same tokens as XLA's backend.

    A token may differ only if the two best float32 logits are closer than the two backends' errors. Our logits must be
    as close to float32's as XLA's are.
    """
    cases = itertools.product(("opt-6m", "llama-6m"), ("float16", "bfloat16"), ("dense", "sparse"))
    for name, dtype in itertools.product(("opt-6m", "llama-6m"), ("float32", "float16", "bfloat16")):
        bundled(name, dtype)  # several threads can't import transformers at once
    with ThreadPoolExecutor(8) as pool:  # nearly all of the time is compilation
        return all(list(pool.map(_check, *zip(*cases, strict=True))))


def _check(name: str, dtype: str, kind: str) -> bool:
    bundle, exact = bundled(name, dtype), bundled(name, "float32")
    assert bundle.tokenizer is not None
    prompts = tuple(map(jnp.asarray, bundle.tokenizer.encode(PROMPTS)))
    sparsity = None if kind == "dense" else fixed(bundle.model.config)
    write = functools.partial(pj.generate, bundle.model, *prompts, max_new_tokens=NEW, sparsity=sparsity)
    with record_backends() as choices:
        ours = np.asarray(write().tokens)
    theirs = np.asarray(write(implementation="xla").tokens)
    follow = functools.partial(logits, prompts=prompts, follow=jnp.asarray(theirs), sparsity=sparsity)
    want, found, xla = follow(exact.model), follow(bundle.model), follow(bundle.model, implementation="xla")
    fine, text = verdict(want, found, xla)
    backends = sorted({f"{choice.op}.{choice.backend}" for choice in choices})
    print(
        f"{'ok  ' if fine else 'FAIL'} {name} {dtype} {kind}: {(ours == theirs).mean():.1%} of the tokens equal; "
        f"{text.format('XLA')}; {', '.join(backends)}",
        flush=True,
    )
    return fine


def verdict(
    want: np.ndarray, found: np.ndarray, other: np.ndarray, *, most: float = 1.25
) -> tuple[bool, str]:
    """Whether `found` logits [M B V] are as good as `other` ones, given float32's; and numbers, {} for the other's name.

    A token may differ only if the two best float32 logits are closer than the two errors; `most` is the largest ratio of
    the errors of all logits.
    """
    far = [float(np.linalg.norm(made - want) / np.linalg.norm(want)) for made in (found, other)]
    errors = np.abs(found - want).max(-1) + np.abs(other - want).max(-1)
    best = np.sort(want, -1)
    differing = found.argmax(-1) != other.argmax(-1)
    unexplained = int((differing & (best[..., -1] - best[..., -2] > errors)).sum())
    text = f"given the same tokens, {differing.sum()} of {differing.size} differ, {unexplained} without a near tie; "
    text += f"error {far[0]:.2e}, {{}}'s {far[1]:.2e}"
    return far[0] <= most * far[1] and unexplained == 0, text


def fixed(config: pj.ModelConfig, mesh: MeshShape = ONE_DEVICE) -> Sparsity:
    """Selects half of the neurons and three quarters of the groups by fixed scores; a router's may nearly tie."""
    layers, rng = config.num_layers, np.random.default_rng(0)
    groups, neurons = (rng.uniform(size=(layers, n)) for n in (config.num_kv_heads, config.d_ff))
    kept = config.d_ff // 2 if config.neuron_sparsity else None
    shards = mesh.model if mesh.attention == "groups" else 1
    by_group = tuple((k and k // shards * shards) or None for k in uniform_groups(config, 0.75))
    plan = pj.SparsityPlan((kept,) * layers, by_group, mesh.model, shards, mesh.data)
    return Sparsity(Static(jnp.asarray(groups, jnp.float32), jnp.asarray(neurons, jnp.float32)), plan)


def logits(model, *, prompts, follow, sparsity, implementation=None) -> np.ndarray:
    """Logits of each step while `follow` [B M] is decoded, float64 [M B V]."""
    tokens, lengths = prompts
    room = tokens.shape[1] + NEW + 8
    cache = pj.init_cache(model.config, batch_size=tokens.shape[0], capacity=room // 8 * 8, dtype=model.dtype)
    logits, cache = jax.jit(pj.prefill)(model, tokens, lengths, cache)
    step = jax.jit(functools.partial(pj.decode_step, sparsity=sparsity, implementation=implementation))
    made = [logits]
    for token in follow.T[:-1]:
        logits, cache = step(model, token, cache)
        made.append(logits)
    return np.asarray(jnp.stack(made), np.float64)


# ---- speed -----------------------------------------------------------------------------------------------


def filled_cache(
    config: pj.ModelConfig, batch: int, capacity: int, *, where: Any = None, rows: Any = None
) -> pj.KVCache:
    """A cache of random values with room left for the timed steps; `where`, `rows`: shardings of values and lengths."""
    shape, key = (batch, config.num_kv_heads, capacity, config.head_dim), jax.random.key(2)
    draw = lambda side: tuple(
        normal(jax.random.fold_in(key, 2 * i + side), shape, 1.0, where) for i in range(config.num_layers)
    )
    length = jax.device_put(np.full((batch,), capacity - STEPS, np.int32), rows)
    return pj.KVCache(draw(0), draw(1), length)


def _steps(model, token, cache, sparsity, start, *, implementation=None):
    """STEPS greedy steps from position `start`."""

    def one(carry, _):
        logits, cache = pj.decode_step(model, *carry, sparsity=sparsity, implementation=implementation)
        return (jnp.argmax(logits, -1).astype(jnp.int32), cache), None

    cache = pj.KVCache(cache.k, cache.v, start)
    return jax.lax.scan(one, (token, cache), None, length=STEPS)[0]


def steps_jit(options: dict[str, Any], compiler_options: dict[str, Any]) -> Any:
    """The loop of STEPS steps, jitted; it takes its cache's memory."""
    steps = functools.partial(_steps, **options)
    return jax.jit(steps, donate_argnames=("cache",), compiler_options=compiler_options)


def lowered(
    shape: DecodeShape,
    batch: int,
    sparsity: Sparsity | None,
    options: dict[str, Any],
    tried: dict[str, Any] | None = None,
) -> Any:
    """The loop of STEPS steps, lowered from shapes alone, with `generate`'s compiler options and those to try."""
    config, tokens = shape.config, jax.ShapeDtypeStruct((batch,), jnp.int32)
    cache = jax.eval_shape(
        lambda: pj.init_cache(config, batch_size=batch, capacity=shape.cache, dtype=jnp.bfloat16)
    )
    loop = steps_jit(options, {**pj.loop_options(batch), **(tried or {})})
    sparsity = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), sparsity)
    return loop.lower(abstract(config, jnp.bfloat16), tokens, cache, sparsity, tokens)


def seconds_per_step(loop, model, cache: pj.KVCache, sparsity) -> tuple[float, float, pj.KVCache]:
    """Median and spread of a step's time in seconds, and the cache, which the loop consumes and returns.

    A few calls of the loop are sent at once, as the engine sends them, so that the device doesn't wait for the host.
    """
    start = cache.length
    token, times = jax.device_put(np.zeros(start.shape, np.int32), start.sharding), []
    for repeat in range(1 + REPEATS):
        jax.block_until_ready(cache)
        started = time.perf_counter()
        for _ in range(CALLS):
            _, cache = loop(
                model, token, pj.KVCache(cache.k, cache.v, jnp.copy(start)), sparsity, jnp.copy(start)
            )
        jax.block_until_ready(cache)
        if repeat:
            times.append((time.perf_counter() - started) / (STEPS * CALLS))
    return float(np.median(times)), max(times) - min(times), pj.KVCache(cache.k, cache.v, start)


def kinds(
    shape: DecodeShape, batch: int, made: Routers, *, xla: bool
) -> Iterator[tuple[str, Sparsity | None, dict[str, Any]]]:
    """(name, sparsity, options) of each kind of step compared at one batch size."""
    yield "dense", None, {}
    if xla:
        yield "dense, XLA's attention", None, {"implementation": "xla"}
    yield f"heads {shape.head_density:g}", Sparsity(made, shape.plan(batch, neurons=False)), {}
    if shape.neuron_density:
        yield shape.kind(batch), Sparsity(made, shape.plan(batch, neurons=True)), {}


def fitting(shape: DecodeShape, batches: Sequence[int] | None) -> list[int]:
    """The batch sizes whose weights and cache fit into the device's memory; says which don't."""
    limit, found = memory.device_memory(), []
    for batch in batches or shape.batches:
        needed = shape.memory(batch)
        if limit is None or needed < limit:
            found.append(batch)
        else:
            print(f"{shape.name} B{batch} needs {needed / 1e9:.0f} GB of {limit / 1e9:.0f}", flush=True)
    return found


def _compiled(loop: Any) -> tuple[Any, float]:
    """The program, and the seconds that the compiler took."""
    started = time.perf_counter()
    made = loop.compile()
    return made, time.perf_counter() - started


def compiled(traced: Iterable[Any]) -> list[tuple[Any, float]]:
    """The programs of lowered loops, each with its compiler's seconds; the next is traced while one is compiled."""
    with ThreadPoolExecutor(1) as pool:  # one at a time, because XLA autotunes its products
        jobs = [pool.submit(_compiled, loop) for loop in traced]
    return [job.result() for job in jobs]


def with_options(kind: str, tried: dict[str, Any]) -> str:
    """A row's kind, and the compiler options that were tried."""
    return kind + "".join(f", {name}={value}" for name, value in tried.items())


def table(args: argparse.Namespace, peak: float | None) -> Iterator[dict[str, Any]]:
    """One row per case and kind; stops early when time runs out."""
    deadline = time.monotonic() + args.seconds
    for shape in map(shape_of, args.models):
        made = routers(shape.config)
        todo = [
            (batch, *kind)
            for batch in fitting(shape, args.batches)
            for kind in kinds(shape, batch, made, xla=args.xla)
        ]
        tried = dict(args.option)
        loops = compiled(lowered(shape, batch, sparsity, more, tried) for batch, _, sparsity, more in todo)
        model = random_model(shape.config) if todo else None
        for batch, of in itertools.groupby(zip(todo, loops, strict=True), key=lambda each: each[0][0]):
            cache, dense = filled_cache(shape.config, batch, shape.cache), None
            for (_, kind, sparsity, _), (loop, compiling) in of:
                if time.monotonic() > deadline:
                    print("out of time", flush=True)
                    return
                median, spread, cache = seconds_per_step(loop, model, cache, sparsity)
                dense = dense or median
                yield {
                    "case": f"{shape.name} B{batch} S{shape.cache}",
                    "kind": with_options(kind, tried),
                    **shape.times(
                        batch,
                        shape.cache - STEPS // 2,
                        median,
                        peak,
                        None if sparsity is None else sparsity.plan,
                    ),
                    "spread_ms": spread * 1e3,
                    "speedup_vs_dense": dense / median,
                    "compile_s": compiling,
                }
            del cache
        del model, made


def _option(text: str) -> tuple[str, int | bool | str]:
    """A compiler option's name and value, with the type that the compiler wants."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    kinds = {"true": True, "false": False}
    return name, int(value) if value.isdigit() else kinds.get(value, value)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="+", choices=("check", "table"))
    parser.add_argument(
        "--models", nargs="+", default=list(SHAPES), choices=(*SHAPES, *LARGE_SHAPES, TINY_SHAPE.name)
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=int,
        help="instead of those of the shape; with --devices: for each index of data, and 0 is the largest that fits",
    )
    parser.add_argument("--xla", action="store_true", help="also the dense step with XLA's attention")
    parser.add_argument(
        "--option", type=_option, action="append", default=[], help="a compiler option to try: NAME=VALUE"
    )
    parser.add_argument("--devices", nargs="+", type=int, help="numbers of devices to use, such as 1 2")
    parser.add_argument(
        "--axes", nargs="+", default=["model"], choices=("data", "model"), help="with --devices: mesh axes"
    )
    parser.add_argument(
        "--attention",
        nargs="+",
        default=["groups"],
        choices=("groups", "sequences"),
        help="with --devices: what the axis model divides in attention",
    )
    parser.add_argument("--seconds", type=float, default=240, help="time limit for the table")
    args = parser.parse_args()
    tiny = args.models == [TINY_SHAPE.name]
    if not tiny:
        timing.require_gpu()
    from bench import mesh_runs  # which imports this module

    if "check" in args.verbs and not (mesh_runs.run_checks(args) if args.devices else run_checks()):
        print("wrong results, so no speed is reported", file=sys.stderr)
        return 1
    if "table" in args.verbs:
        peak = None if tiny else timing.copy_bandwidth()
        more = {} if peak is None else {"copy_gbps": peak / 1e9}
        head = report.provenance(persistent_cache=report.cache_state(), **more)
        if args.devices:
            report.measure(mesh_runs.table(args, peak), head, "decode_mesh.jsonl", mesh_runs.COLUMNS)
        else:
            report.measure(table(args, peak), head, "decode.jsonl", COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
