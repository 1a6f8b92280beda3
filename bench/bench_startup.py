"""How long commands, imports and loading take in a new process: the shortest of several runs of each, on a CPU.

    python -m bench.bench_startup --repeats 5 [--busy]

makes a random LLaMA checkpoint of the shapes of SmolLM2-135M (272 tensors, 269 MB, bfloat16) with the tokenizer of a
bundled model, and measures the rows in turns, each in a new process: `import jax` for comparison, imports, help,
`inspect`, `convert`, a plain copy of the checkpoint, and loading. "cpu_seconds" is the CPU time of all threads; `--busy`
keeps every processor busy meanwhile.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bench import report

ASSETS = report.ROOT / "polarjax" / "assets" / "llama-6m"
COLUMNS = ("what", "seconds", "cpu_seconds", "of_import_jax")
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, NEURONS, VOCAB = 30, 576, 9, 3, 64, 1536, 49152


def write_checkpoint(folder: Path) -> None:
    """A random tied checkpoint of SmolLM2-135M's shapes, as HuggingFace writes it."""
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"self_attn.{n}_proj.weight": (KV_HEADS * HEAD, WIDTH) for n in "kv"}
        shapes |= {layer + "self_attn.q_proj.weight": (HEADS * HEAD, WIDTH)}
        shapes |= {layer + "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD)}
        shapes |= {layer + f"mlp.{n}_proj.weight": (NEURONS, WIDTH) for n in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": (WIDTH, NEURONS)}
        shapes |= {layer + f"{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    random = np.random.default_rng(0)
    made = {n: random.normal(0, 0.02, shape).astype(ml_dtypes.bfloat16) for n, shape in shapes.items()}
    shutil.copytree(ASSETS, folder)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "intermediate_size": NEURONS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))


def cases(source: Path, model: Path, out: Path) -> dict[str, list[str]]:
    """The commands to time, by name."""
    python = lambda code: [sys.executable, "-c", code]
    polarjax = lambda *words: [sys.executable, "-m", "polarjax.cli.main", *map(str, words)]
    copy = f"import shutil; shutil.copytree({str(source)!r}, {str(out)!r})"
    return {
        "import jax": python("import jax"),
        "import polarjax": python("import polarjax"),
        "import polarjax, every name": python("import polarjax as pj; [getattr(pj, n) for n in pj.__all__]"),
        "polarjax --help": polarjax("--help"),
        "polarjax generate --help": polarjax("generate", "--help"),
        "polarjax inspect HF_DIR": polarjax("inspect", source),
        "polarjax inspect MODEL": polarjax("inspect", model, "--memory", 24),
        "pj.load with tokenizer": python(f"import polarjax as pj; pj.load({str(model)!r})"),
        "copy HF_DIR": python(copy),
        "polarjax convert": polarjax("convert", source, out),
    }


def seconds_of(command: list[str]) -> tuple[float, float]:
    """Seconds of one run: wall time, and CPU time of all threads."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    spent, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(folder: Path, repeats: int, busy: bool) -> list[dict[str, Any]]:
    """The rows of the table."""
    write_checkpoint(folder / "hf")
    model, out = folder / "model", folder / "out"
    commands = cases(folder / "hf", model, out)
    seconds_of([*commands["polarjax convert"][:-1], str(model)])
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range((os.cpu_count() or 1) if busy else 0)]
    runs: dict[str, list[tuple[float, float]]] = {what: [] for what in commands}
    try:
        for _ in range(repeats):
            for what, command in commands.items():
                runs[what].append(seconds_of(command))
                shutil.rmtree(out, ignore_errors=True)
    finally:
        for other in others:
            other.kill()
    best = {what: min(pairs) for what, pairs in runs.items()}
    return [
        {
            "what": what,
            "seconds": seconds,
            "cpu_seconds": used,
            "of_import_jax": seconds / best["import jax"][0],
            "busy": busy,
            "all_seconds": [round(each, 2) for each, _ in runs[what]],
        }
        for what, (seconds, used) in best.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    parser.add_argument("--busy", action="store_true", help="keep all processors busy meanwhile")
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; default: the temporary folder"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), args.repeats, args.busy)
    print(report.table(rows, COLUMNS))
    if path := report.results_path("startup.jsonl"):
        libraries = {name: version(name) for name in ("transformers", "torch", "orbax-checkpoint", "flax")}
        machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[1], "python": sys.version.split()[0]}
        report.append_jsonl(path, rows, report.provenance(**machine, **libraries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
