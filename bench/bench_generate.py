"""A fixed trace of requests through `pj.Engine`, its server, and static batches of the same size, dense and sparse.

    python3 -m bench.bench_generate table [--model llama-2-7b] [--slots 64] [--requests 1024]
    python3 -m bench.bench_generate compile            only compiles the engine's programs, and says how long it takes

The trace is that of bench/trace.py: prompt lengths log-uniform from 32 to 2,048, new tokens geometric with mean 256, at
most 1,024 (all shortened alike for models with fewer positions); all requests are there from the start. Weights are
random. Programs are compiled before anything is timed. With JAX_COMPILATION_CACHE_DIR, a second run finds its programs
in that folder; `persistent_cache` says which of the two a row is. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. If the
variable OUT is set, JSON lines are written to that folder. `--model tiny` runs on any device.
"""

import argparse
import functools
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import polarjax as pj
from bench import engine_runs, report, server_runs, static_batches, timing
from bench.engine_runs import WatchedEngine
from bench.models import SHAPES, TINY_SHAPE, DecodeShape, shape_of
from bench.random_models import random_bundle
from bench.trace import LONGEST, MOST_NEW, REQUESTS, Wish, capacity, make_trace

COLUMNS = (
    "kind",
    "seconds",
    "tokens_per_s",
    "prompts_per_s",
    "rows_in_use_pct",
    "pct_of_steps",
    "pct_of_work",
    "longest_gap_chunks",
    "over_static",
    "over_dense",
    "over_engine",
)
PARTS = ("lone", "engine", "serve", "static")
KINDS = ("dense", "sparse")
LONE = (512, 2048)

Row = dict[str, Any]


def scale_of(config: pj.ModelConfig) -> float:
    """By how much the trace is shortened to fit into the model's positions."""
    return min(1.0, config.max_positions / (LONGEST + MOST_NEW))


def rates(trace: Sequence[Wish], tokens: list[int], seconds: float, failed: int) -> Row:
    """Speeds of a run in which every request got all of its tokens; no speed if one didn't."""
    short = sum(got != wish.new for got, wish in zip(tokens, trace, strict=True))
    row: Row = {"new_tokens": sum(tokens), "prompt_tokens": sum(len(wish.prompt) for wish in trace)}
    if short or failed:
        return row | {"wrong": f"{short} requests without all their tokens, {failed} failed"}
    return row | {
        "seconds": seconds,
        "tokens_per_s": row["new_tokens"] / seconds,
        "prompts_per_s": len(trace) / seconds,
        "prompt_tokens_per_s": row["prompt_tokens"] / seconds,
    }


class Bench:
    """Runs the parts on one bundle; each gives rows."""

    def __init__(self, shape: DecodeShape, slots: int, requests: int) -> None:
        self.config, self.slots = shape.config, slots
        self.scale = scale_of(shape.config)
        self.trace = make_trace(shape.config.vocab_size, requests=requests, scale=self.scale)
        self.bundle = random_bundle(shape)
        self.case = f"{shape.name} B{slots} R{requests}"
        self.speeds: dict[str, Row] = {}

    def row(self, part: str, kind: str, columns: Row) -> Row:
        """A row with its case."""
        self.speeds[f"{part} {kind}"] = columns
        return {"case": self.case, "kind": f"{part}, {kind}", **columns}

    def ratio(self, column: str, above: str, below: str) -> float | None:
        """One row's number over another's; None if either wasn't measured."""
        numbers = [self.speeds.get(name, {}).get(column) for name in (above, below)]
        return None if None in numbers else numbers[0] / numbers[1]  # pyrefly: ignore[unsupported-operation]

    def engine(self, kind: str) -> tuple[WatchedEngine, Row]:
        """An engine with all of its programs, and how long those took to compile."""
        cache = report.cache_state()
        started = time.perf_counter()
        made = WatchedEngine(
            self.bundle, slots=self.slots, capacity=capacity(self.scale), dense=kind == "dense"
        )
        made.warm_up()
        gc.freeze()  # as `polarjax serve` does
        seconds = time.perf_counter() - started
        columns = {"compile_s": seconds, "programs": len(made.calls) + 2, "persistent_cache": cache}
        return made, self.row("compile", kind, columns)

    def lone(self, engine: WatchedEngine, kind: str) -> Iterator[Row]:
        """First tokens of requests that come alone."""
        for length in (max(2, round(length * self.scale)) for length in LONE):
            first = engine_runs.first_token(engine, self.config.vocab_size, length)
            bare = engine_runs.bare_prefill(self.bundle.model, length)
            columns = {"first_token_ms": first * 1e3, "prefill_ms": bare * 1e3, "over_prefill": first / bare}
            yield self.row(f"lone T{length}", kind, columns)

    def run(self, engine: WatchedEngine, kind: str) -> Row:
        """The trace through the engine."""
        done = engine_runs.run(engine, self.trace)
        failed = len(self.trace) - done.endings["length"]
        columns = rates(self.trace, done.tokens, done.seconds, failed)
        if "wrong" not in columns:
            columns |= engine_runs.measured(engine, done)
        self.speeds[f"engine {kind}"] = columns
        tokens = functools.partial(self.ratio, "tokens_per_s")
        columns |= {"over_static": tokens(f"engine {kind}", f"static {kind}")}
        if kind == "sparse":
            columns |= {
                "over_dense": tokens("engine sparse", "engine dense"),
                "chunk_over_dense": self.ratio("chunk_ms", "engine dense", "engine sparse"),
            }
        return self.row("engine", kind, columns)

    def serve(self, engine: WatchedEngine, kind: str) -> Row:
        """The trace through a server of the engine; by clients that have one request each at a time."""
        got = server_runs.run(self.bundle, engine, self.trace, scale=self.scale)
        for line in got.errors[:5]:
            print(line, flush=True)
        columns = rates(self.trace, got.tokens, got.seconds, len(got.errors))
        self.speeds[f"serve {kind}"] = columns
        first = sorted(got.first)
        columns |= {
            "clients": server_runs.CLIENTS,
            "median_first_text_ms": 1e3 * first[len(first) // 2],
            "over_engine": self.ratio("tokens_per_s", f"serve {kind}", f"engine {kind}"),
        }
        return self.row("serve", kind, columns)

    def static(self, kind: str) -> Row:
        """The trace in static batches."""
        given = {"bundle": self.bundle, "trace": self.trace, "size": self.slots, "dense": kind == "dense"}
        cache, started = report.cache_state(), time.perf_counter()
        static_batches.warm_up(**given)
        compiled = time.perf_counter() - started
        done = static_batches.run(**given)
        columns = rates(self.trace, done.tokens, done.seconds, done.failed)
        drew = sum(done.tokens) - len(done.tokens)  # the first one comes from the prompt
        columns |= {"rows_in_use_pct": 100 * drew / max(1, done.steps)}
        columns |= {"compile_s": compiled, "persistent_cache": cache}
        return self.row("static", kind, columns)


def table(bench: Bench, parts: Sequence[str], kinds: Sequence[str], seconds: float) -> Iterator[Row]:
    """One row for each part and kind; starts none after `seconds`."""
    deadline = time.monotonic() + seconds
    late = lambda: time.monotonic() > deadline and (print("out of time", flush=True) or True)
    for kind in kinds:
        if "static" in parts and not late():
            yield bench.static(kind)
        if {"engine", "lone", "serve"} & set(parts) and not late():
            engine, row = bench.engine(kind)
            with engine:
                yield row
                if "lone" in parts and not late():
                    yield from bench.lone(engine, kind)
                if "engine" in parts and not late():
                    yield bench.run(engine, kind)
                if "serve" in parts and not late():
                    yield bench.serve(engine, kind)  # last, as the server closes the engine


def compile_only(bench: Bench, kinds: Sequence[str]) -> Iterator[Row]:
    """How long the engine's programs take to compile."""
    for kind in kinds:
        engine, row = bench.engine(kind)
        engine.close()
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("table", "compile"))
    parser.add_argument("--model", default="llama-2-7b", choices=(*SHAPES, TINY_SHAPE.name))
    parser.add_argument("--slots", type=int, default=64, help="requests that run at a time")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of the trace, from its beginning")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seconds", type=float, default=540, help="no part is begun after so long")
    args = parser.parse_args()
    if args.model != TINY_SHAPE.name:
        timing.require_gpu()
    head = report.provenance()
    bench = Bench(shape_of(args.model), args.slots, args.requests)
    if args.verb == "compile":
        rows, columns = compile_only(bench, args.kinds), ("case", "kind", "compile_s", "persistent_cache")
    else:
        rows, columns = table(bench, args.parts, args.kinds, args.seconds), COLUMNS
    report.measure(rows, head, "generate.jsonl", columns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
