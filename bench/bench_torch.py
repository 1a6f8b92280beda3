"""Dense decoding steps in PyTorch, for the shapes and cells of bench_decode; in a process of its own, without JAX's GPU.

    python3 -m bench.bench_torch torch transformers [--models …]

"torch" is the step of bench/torch_step.py, compiled by torch.compile and captured in a CUDA graph; the faster of
PyTorch's own choice of attention and cuDNN's counts. "transformers" is the family's own class with a `StaticCache`,
compiled with mode "reduce-overhead", as its `generate` does. A cell's byte floor is that of bench_decode, at the
bandwidth of a copy measured here. Cells that don't fit, or packages that are missing, are said in a line and have no
row. `--jobs 5` compiles up to 5 cells at a time, as the memory allows, and times one after the other. `--models tiny`
runs without a GPU, uncompiled. If the variable OUT is set, JSON lines are written to that folder.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import report, turns
from bench.models import SHAPES, TINY_SHAPE, DecodeShape, shape_of

STEPS, REPEATS = 16, 5
KINDS = ("torch", "transformers")
COLUMNS = ("case", "kind", "ms_per_step", "tokens_per_s", "pct_of_floor", "attention", "compile_s")
FAMILIES = {"opt": "OPT", "llama": "Llama", "mistral": "Mistral", "qwen2.5": "Qwen2", "tiny": "Llama"}

Row = dict[str, Any]
type Turn = Callable[[Callable[[], float]], float]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=(*SHAPES, TINY_SHAPE.name))
    parser.add_argument("--batches", nargs="+", type=int, help="instead of those of the shape")
    parser.add_argument("--seconds", type=float, default=540, help="no cell is begun after so long")
    parser.add_argument("--jobs", type=int, default=1, help="cells to compile at a time")
    parser.add_argument("--turns", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("bench: PyTorch is not installed. Hint: pip install torch")
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and args.models != [TINY_SHAPE.name]:
        raise SystemExit(
            "bench: needs a GPU that PyTorch can use; got none. Hint: try --models tiny without one"
        )
    torch.set_grad_enabled(False)
    peak = args.peak or (_copy_bandwidth() if gpu else None)
    if args.jobs > 1:
        _side_by_side(args, peak)
        return 0
    head = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "platform": "gpu" if gpu else "cpu",
        "torch": torch.__version__,
        "commit": report.commit(),
        **({} if peak is None else {"copy_gbps": peak / 1e9}),
    }
    report.measure(table(args, peak), head, "torch.jsonl", COLUMNS)
    return 0


def _side_by_side(args: argparse.Namespace, peak: float | None) -> None:
    """Each cell and kind in a process of its own."""
    import torch

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info()[0] if gpu else float("inf")
    shared = ("--seconds", str(args.seconds), *(() if peak is None else ("--peak", str(peak))))
    jobs = [
        turns.Job(
            f"{shape.name}-{batch}-{kind}",
            ("-m", "bench.bench_torch", kind, "--models", shape.name, "--batches", str(batch), *shared),
            memory(kind, shape, batch),
        )
        for shape in map(shape_of, args.models)
        for batch in args.batches or shape.batches
        for kind in args.kinds
    ]
    deadline = time.monotonic() + args.seconds
    for group in turns.groups(jobs, room, args.jobs):
        if time.monotonic() > deadline:
            print("out of time", flush=True)
            return
        turns.run(group)


def table(args: argparse.Namespace, peak: float | None) -> Iterator[Row]:
    """One row per cell and kind that runs."""
    deadline = time.monotonic() + args.seconds
    turn: Turn = lambda measure: measure()
    if args.turns:
        folder, name, members = args.turns
        turn = turns.Turns(Path(folder), name, int(members))
    for shape in map(shape_of, args.models):
        for batch in args.batches or shape.batches:
            for kind in args.kinds:
                if time.monotonic() > deadline:
                    print("out of time", flush=True)
                    return
                found = cell(kind, shape, batch, turn)
                if found is not None:
                    seconds = found.pop("seconds")
                    case = {"case": f"{shape.name} B{batch} S{shape.cache}", "kind": kind}
                    yield {**case, **shape.times(batch, shape.cache, seconds, peak), **found}


def memory(kind: str, shape: DecodeShape, batch: int) -> int:
    """Bytes that a step needs. transformers repeats keys and values for every head: room for those of two layers."""
    c = shape.config
    repeated = kind == "transformers" and c.num_heads > c.num_kv_heads
    layer = 2 * 2 * batch * shape.cache * c.num_heads * c.head_dim
    return shape.memory(batch) + 2 * layer * repeated


def cell(kind: str, shape: DecodeShape, batch: int, turn: Turn) -> Row | None:
    """A cell's seconds per step; None, and a line that says why, if it can't be measured."""
    import torch

    needed = memory(kind, shape, batch)
    if torch.cuda.is_available() and needed > torch.cuda.mem_get_info()[0]:
        print(f"{shape.name} B{batch} does not fit: needs {needed / 1e9:.0f} GB", flush=True)
        return None
    try:
        return (_torch if kind == "torch" else _transformers)(shape, batch, turn)
    except Exception as error:  # whatever a compiler, a kernel or the memory says: the next cell may run
        print(f"{shape.name} B{batch} {kind}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None
    finally:
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _torch(shape: DecodeShape, batch: int, turn: Turn) -> Row:
    """The hand-written step; on a CPU as it is."""
    import torch

    from bench.torch_step import TorchStep

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    step = TorchStep(shape.config, batch, shape.cache, device=device).next_tokens
    given = (
        torch.zeros(batch, dtype=torch.long, device=device),
        torch.full((1,), shape.cache - 1, device=device),
    )
    if not gpu:
        return {"seconds": turn(lambda: _seconds(lambda: step(*given)))}
    found: list[tuple[float, str, float]] = []
    for attention in ("default", "cudnn"):
        started = time.perf_counter()
        try:
            replay = _captured(step, given, attention)
        except RuntimeError as error:
            print(f"{shape.name} B{batch} {attention}: {str(error)[:200]}", flush=True)
            continue
        compiling = time.perf_counter() - started
        found.append((turn(functools.partial(_seconds, replay)), attention, compiling))
    seconds, attention, compiling = min(found)
    return {"seconds": seconds, "attention": attention, "compile_s": compiling}


def _captured(step: Callable[..., Any], given: tuple[Any, ...], attention: str) -> Callable[[], Any]:
    """The compiled step as a CUDA graph, to be replayed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.compiler.reset()
    only = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if attention == "cudnn" else contextlib.nullcontext()
    with only:
        compiled = torch.compile(step, fullgraph=True, dynamic=False)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(3):
                compiled(*given)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            compiled(*given)
    return graph.replay


def _transformers(shape: DecodeShape, batch: int, turn: Turn) -> Row:
    """The family's own class with random weights; on a CPU uncompiled."""
    import torch
    from transformers.cache_utils import StaticCache

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = family(shape, device)
    cache: Any = StaticCache(config=model.config, max_cache_len=shape.cache)
    ids = torch.zeros(batch, 8, dtype=torch.long, device=device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)  # allocates the cache
    forward = torch.compile(model.forward, mode="reduce-overhead") if gpu else model.forward
    first = shape.cache - STEPS - 1
    token = ids[:, :1].clone()
    position = torch.full((batch, 1), first, dtype=torch.long, device=device)

    counting = hasattr(
        cache.layers[0], "cumulative_length"
    )  # a layer counts its tokens, since transformers 5
    where: Row = {} if counting else {"cache_position": position[0]}
    if model.config.model_type == "opt":  # without a mask, it makes one of a length that it waits for
        where["attention_mask"] = torch.ones(batch, shape.cache, dtype=torch.long, device=device)

    def step() -> None:
        out = forward(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True, **where)
        out.logits[:, -1].argmax(-1)

    def back() -> None:
        for layer in cache.layers if counting else ():
            layer.cumulative_length.fill_(first)

    back()
    started = time.perf_counter()
    step()
    if gpu:
        torch.cuda.synchronize()
    compiling = time.perf_counter() - started
    seconds = turn(lambda: _seconds(step, before=back))
    return {"seconds": seconds, "compile_s": compiling, "transformers": version("transformers")}


def family(shape: DecodeShape, device: Any) -> Any:
    """A transformers model of this shape on the device, bfloat16, random."""
    import torch
    import transformers

    c = shape.config
    name = next(family for prefix, family in FAMILIES.items() if shape.name.startswith(prefix))
    common = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tie_embeddings,
    }
    if name == "OPT":
        own = {"ffn_dim": c.d_ff, "word_embed_proj_dim": c.d_model, "dropout": 0.0}
    else:
        own = {"intermediate_size": c.d_ff, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim}
        own |= {"sliding_window": None} if name in ("Mistral", "Qwen2") else {}
    config = getattr(transformers, f"{name}Config")(**common, **own)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return getattr(transformers, f"{name}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(before)


def _seconds(step: Callable[[], Any], before: Callable[[], None] = lambda: None) -> float:
    """Median seconds of a step in runs of `STEPS`."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(1 + REPEATS):
        before()
        wait()
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        times.append((time.perf_counter() - started) / STEPS)
    return statistics.median(times[1:])


def _copy_bandwidth(size: int = 2 * 2**30) -> float:
    """Bytes per second, reads plus writes, of a copy of `size` bytes."""
    import torch

    x = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    return 2 * size / _seconds(lambda: torch.bitwise_xor(x, 0x5A5A5A5A, out=y))


if __name__ == "__main__":
    sys.exit(main())
