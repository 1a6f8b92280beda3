"""The README's speed tables, made from bench/results/*.jsonl.

    python3 -m bench.readme_tables            writes them between the markers in README.md

A row that is in no results file says "not measured". Percentages are the bytes that must be read, divided by the time,
relative to the bandwidth of a copy in the same run.
"""

import argparse
import itertools
import sys
from pathlib import Path

from bench import report
from bench.models import SHAPES, DecodeShape, shape_of
from bench.table_cells import MISSING, Results, Row, number, ratio, section, source_of, speedup, table
from bench.workloads import MODELS, AttentionCase

RESULTS = Path(__file__).parent / "results"
README = report.ROOT / "README.md"
BEGIN, END = "<!-- made by bench.readme_tables -->", "<!-- end of what bench.readme_tables makes -->"
NAMES = {
    "opt-6.7b": "OPT-6.7B",
    "opt-30b": "OPT-30B",
    "opt-66b": "OPT-66B",
    "opt-66b-layer": "OPT-66B, one layer",
    "llama-2-7b": "LLaMA-2-7B",
    "llama-2-13b": "LLaMA-2-13B",
    "llama-3.1-8b": "LLaMA-3.1-8B",
    "llama-3.1-70b": "LLaMA-3.1-70B",
    "llama-3.1-405b": "LLaMA-3.1-405B",
    "llama-3.1-70b-layer": "LLaMA-3.1-70B, one layer",
    "mistral-7b": "Mistral-7B",
    "qwen2.5-14b": "Qwen2.5-14B",
}
ATTENTION = (
    ("opt-6.7b", 1920),
    ("opt-66b", 1920),
    ("llama-2-7b", 3968),
    ("llama-3.1-8b", 8192),
    ("llama-3.1-70b", 8192),
)
MLP = ("opt-6.7b", "opt-66b", "llama-2-7b")


def attention(folder: Path) -> str:
    results, lines = Results.read("decode_attention", folder), []
    for model, cache in ATTENTION:
        shape = MODELS[model]
        for batch in (16, 64):
            of = f"{model} B{batch} S{cache} d"
            dense, cudnn = results.get(of + "1", "mosaic"), results.get(of + "1", "cudnn")
            cells = [number(dense, "time_us", "{:,.0f} µs"), number(dense, "pct_peak", "{:.0f} %")]
            for density in (0.3, 0.5):
                row = results.get(f"{of}{density}", "mosaic")
                kept = AttentionCase(shape, batch, cache, density).selected
                share = number(row, "pct_peak", "{:.0f} %")
                cells.append(
                    f"{kept} of {shape.kv_heads}: {share}, {speedup(dense, row)}" if row else MISSING
                )
            lines.append((f"{NAMES[model]}, {batch}, {cache:,}", *cells, ratio(cudnn, dense)))
    header = (
        "shapes, batch, cache",
        "dense",
        "of copy",
        "density .3",
        "density .5",
        "dense speedup over cuDNN",
    )
    note = (
        "Time of our dense kernel, and what our sparse kernel gains when it reads only some groups: groups kept "
        "(rounded down), percent of the copy bandwidth, and speedup over our dense kernel."
    )
    return section("Attention kernel", note, f"{results.source()}, bfloat16", table(header, lines))


def mlp(folder: Path) -> str:
    results, lines = Results.read("sparse_mlp", folder), []
    for model in MLP:
        for batch in (1, 16, 64):
            of = f"{model} B{batch} d"
            dense = results.get(of + "1", "dense")
            cells = [number(dense, "time_us", "{:,.0f} µs")]
            for density in ("0.1", "0.3"):
                row = results.get(of + density, None)
                cells += [number(row, "pct_peak", "{:.0f} %"), ratio(dense, row)]
            gathered = ratio(results.get(of + "0.1", "take+dot"), results.get(of + "0.1", None))
            if {*cells, gathered} != {MISSING}:
                lines.append((f"{NAMES[model]}, {batch}", *cells, gathered))
    header = (
        "shapes, batch",
        "dense, in XLA",
        "density .1",
        "speedup",
        "density .3",
        "speedup",
        "speedup over XLA's take + dot, .1",
    )
    lines = lines or [("all", *[MISSING] * (len(header) - 1))]
    note = (
        "Time of the dense MLP in XLA, and what our kernel gains when it reads only some neurons: percent of the copy "
        "bandwidth, and speedup over the dense MLP."
    )
    return section("Selective MLP", note, f"{results.source()}, bfloat16", table(header, lines))


def selection(folder: Path) -> str:
    results, lines = Results.read("selection", folder), []
    wanted = (("0.1", "mosaic"), ("0.3", "mosaic"), ("0.3", "xla"))
    cases = [(model, batch) for model in ("opt-6.7b", "opt-66b") for batch in (1, 64)]
    rows = {
        (model, batch): [results.get(f"{model} B{batch} d{density}", kernel) for density, kernel in wanted]
        for model, batch in cases
    }
    for (model, batch), found in rows.items():
        cells = [number(row, "time_us", "{:,.1f} µs") for row in found]
        lines.append((f"{NAMES[model]}, {batch}", *cells))
    header = ("shapes, batch", "density .1", "density .3", "XLA, density .3")
    note = "Device time of picking the top neurons from the router's scores, compared with XLA's own top-k."
    return section("Selection of neurons", note, results.source(), table(header, lines))


def steps(folder: Path) -> str:
    results, torch = Results.read("decode", folder), Results.read("torch", folder, alone=True)
    lines, absent = [], []
    for shape in SHAPES.values():
        found = {batch: _cell(shape, batch, results, torch) for batch in shape.batches}
        none = [str(batch) for batch, (*_, cells) in found.items() if set(cells) == {MISSING}]
        lines += [
            (f"{NAMES[shape.name]}, {size}", kept, *cells)
            for size, kept, cells in found.values()
            if set(cells) != {MISSING}
        ]
        absent += [f"{NAMES[shape.name]} at {' and '.join(none)}"] if none else []
    header = (
        "shapes, batch, cache",
        "kept",
        "dense, ms",
        "of floor",
        "sparse, ms",
        "of floor",
        "tokens/s",
        "sparse over dense",
        "PyTorch, ms",
        "dense over PyTorch",
        "transformers, ms",
    )
    note = (
        "Time of a whole decoding step with random weights, by the host's clock, beside a dense step in PyTorch "
        "(compiled, in a CUDA graph) and transformers' compiled static cache. The floor is the time it takes to move "
        "the bytes that the step has to read, at the copy bandwidth."
    )
    note += f" Not measured at all: {', '.join(absent)}." if absent else ""
    source = "; ".join(each.source() for each in (results, torch) if each.used or each is results)
    return section("Whole models", note, source, table(header, lines))


def _cell(
    shape: DecodeShape, batch: int, results: Results, torch: Results
) -> tuple[str, str, tuple[str, ...]]:
    """One line: batch and cache, what is kept, and what was measured."""
    case = f"{shape.name} B{batch} S{shape.cache}"
    dense, sparse = results.get(case, "dense"), results.get(case, shape.kind(batch))
    compiled, theirs = (_same_device(torch.get(case, kind), dense) for kind in ("torch", "transformers"))
    found = (
        number(dense, "ms_per_step", "{:.2f}"),
        number(dense, "pct_of_floor", "{:.0f} %"),
        number(sparse, "ms_per_step", "{:.2f}"),
        number(sparse, "pct_of_floor", "{:.0f} %"),
        number(sparse, "tokens_per_s", "{:,.0f}"),
        ratio(dense, sparse, "ms_per_step"),
        number(compiled, "ms_per_step", "{:.2f}"),
        ratio(compiled, dense, "ms_per_step"),
        number(theirs, "ms_per_step", "{:.2f}"),
    )
    return f"{batch}, {shape.cache:,}", shape.kind(batch), found


def _same_device(row: Row | None, ours: Row | None) -> Row | None:
    """The row, unless it was measured on another device."""
    return row if row and (ours is None or ours["device"] == row["device"]) else None


def meshes(folder: Path) -> str:
    path = folder / "decode_mesh.jsonl"
    rows = [row for row in report.read_jsonl(path) if row["devices"] == 2] if path.is_file() else []
    found = {(row["case"], row["mesh"], row["kind"]): row for row in rows}
    lines = []
    for case, mesh in sorted({key[:2] for key in found}, key=lambda key: _order(*key)):
        dense = found.get((case, mesh, "dense"))
        name, batch, cache = case.split()
        sparse = found.get(
            (case, mesh, shape_of(name).kind(int(batch[1:]) // (2 if "data=2" in mesh else 1)))
        )
        cells = [NAMES[name], f"{batch[1:]}, {int(cache[1:]):,}", _divided(mesh)]
        for row in (dense, sparse):
            cells += [number(row, "ms_per_step", "{:.2f}"), number(row, "pct_of_floor", "{:.0f} %")]
            cells += [number(row, "speedup_vs_one", "{:.2f} ×")]
        lines.append((*cells, ratio(dense, sparse, "ms_per_step")))
    times = ("ms", "of floor", "over one GPU")
    columns = [f"{kind}, {each}" for kind in ("dense", "sparse") for each in times]
    header = ("shapes", "batch, cache", "what they divide", *columns, "sparse over dense")
    note = (
        "A whole decoding step on two GPUs, and tokens/s over those of one in the same run, which has half the batch "
        "where sequences are divided. The floor counts a device's bytes and what the two exchange. On one GPU and on "
        "two, a part of the host's time is in each step ([what a call takes](bench/README.md#what-a-call-takes))."
    )
    return section("Two GPUs", note, source_of(rows), table(header, lines or [[MISSING] * 10]))


def _divided(mesh: str) -> str:
    """What the devices divide, in words."""
    if "data=2" in mesh:
        return "sequences"
    return "model" if "groups" in mesh else "model, attention by sequences"


def _order(case: str, mesh: str) -> tuple[int, str, int]:
    name, batch, _ = case.split()
    return list(NAMES).index(name), _divided(mesh), int(batch[1:])


def jobs(folder: Path) -> str:
    results, lines = Results.read("generate", folder), []
    for case, kind in itertools.product(results.cases or ("llama-2-7b B64 R1024",), ("dense", "sparse")):
        name, slots, requests = case.split()
        parts = ("engine", "static", "serve")
        engine, static, serve = (results.get(case, f"{part}, {kind}") for part in parts)
        if engine is not None or not results.cases:
            lone = [results.get(case, f"lone T{length}, {kind}") for length in (512, 2048)]
            lines.append(
                (
                    f"{NAMES[name]}, {slots[1:]}, {int(requests[1:]):,}",
                    kind,
                    number(engine, "tokens_per_s", "{:,.0f}"),
                    number(engine, "prompts_per_s", "{:.1f}"),
                    number(engine, "rows_in_use_pct", "{:.0f} %"),
                    number(engine, "pct_of_steps", "{:.0f} %"),
                    number(engine, "longest_gap_chunks", "{:.1f}"),
                    number(static, "tokens_per_s", "{:,.0f}"),
                    ratio(engine, static, "tokens_per_s"),
                    ratio(serve, engine, "tokens_per_s"),
                    ", ".join(dict.fromkeys(number(row, "over_prefill", "{:.2f} ×") for row in lone)),
                )
            )
    header = (
        "shapes, slots, requests",
        "steps",
        "tokens/s",
        "prompts/s",
        "rows in use",
        "of steps alone",
        "longest gap, chunks",
        "static batches, tokens/s",
        "engine over static",
        "server over engine",
        "lone first token over prefill, 512 and 2,048",
    )
    note = (
        "A fixed trace of requests (prompts of 32 to 2,048 tokens, new tokens with mean 256) through `pj.Engine`, "
        "through static batches of the same size, and through its server with 64 clients: new tokens per second, "
        "slot-steps that drew a token while requests waited, tokens/s as a share of what the decoding steps alone "
        "would give, and the longest time between two events of a request, in chunks of 8 steps."
    )
    return section("Whole jobs", note, results.source(), table(header, lines))


def markdown(folder: Path = RESULTS) -> str:
    """All tables, as they appear between the markers."""
    made = (attention, mlp, selection, steps, meshes, jobs)
    return "\n\n".join(each(folder) for each in made)


def spliced(readme: str, tables: str) -> str:
    """`readme` with `tables` between its markers. Raises ValueError unless it has exactly one pair of markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after:
        raise ValueError(
            f"README: needs exactly one pair of markers around its tables; expected {BEGIN} and {END}"
        )
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    README.write_text(spliced(README.read_text(encoding="utf-8"), markdown()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
