"""What learning takes at the size of a published model: time, disk and device memory, beside what was planned.

    python -m bench.quality.scale --shape opt-6.7b --out scale.jsonl
    python -m bench.quality.scale --shape llama-2-7b --only tune --train routers attention

The weights are random. Each part runs in a process of its own, because the device counts its peak since the process
began.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import polarjax as pj
from bench.models import LLAMA_2_7B, OPT_6_7B
from bench.report import append_jsonl, provenance, table
from polarjax.memory import device_memory, peak_memory
from polarjax.progress import show_lines
from polarjax.selection.routers import LayerRouter, Routers, init_routers
from polarjax.sparsity import TuneOptions, calibrate, footprint, train_routers, tuning, tuning_setup
from polarjax.sparsity.activations import Activations, open_activations, part_of, row_bytes
from polarjax.sparsity.collection import means_of, plan_recording, record
from polarjax.sparsity.options import CalibrateOptions, CollectOptions, TrainOptions

TOKENS = 400_000  # as many as the published routers were trained on
DISK = 40 * 10**9
PARTS = ("collect", "train", "calibrate", "tune")
TINY = pj.ModelConfig(
    vocab_size=512,
    num_layers=4,
    d_model=64,
    d_ff=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_positions=512,
    activation="relu",
    gated_mlp=False,
    rope=pj.RopeConfig(),
)
SHAPES = {"opt-6.7b": OPT_6_7B, "llama-2-7b": LLAMA_2_7B, "tiny": TINY}
COLUMNS = ("part", "tokens", "seconds_per_1k_tokens", "planned_gb", "peak_gb", "ratio", "disk_gb", "note")


def main() -> int:
    """Runs the parts one after the other, each in a process of its own."""
    asked = _arguments().parse_args()
    if asked.part is not None:
        return _one(asked)
    parts = [(part, train) for part in asked.only for train in (asked.train if part == "tune" else [None])]
    with tempfile.TemporaryDirectory(prefix="polarjax-scale-", dir=asked.work) as folder:
        rows = [row for part, train in parts for row in _apart(asked, part, train, folder)]
    print(table(rows, COLUMNS))
    return 0 if len(rows) == len(parts) else 1


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    parser.add_argument("--train", nargs="+", default=["routers", "attention", "all"], help="subsets to tune")
    parser.add_argument("--windows", type=int, default=48, help="windows of text to collect")
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    parser.add_argument("--batch", type=int, default=4, help="windows per step of tuning")
    parser.add_argument("--steps", type=int, default=5, help="steps of tuning")
    parser.add_argument("--work", type=Path, help="folder for the activations; default: a temporary one")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def _apart(asked: argparse.Namespace, part: str, train: str | None, folder: str) -> list[dict[str, Any]]:
    """The rows of a part, measured in a new process; none if it failed."""
    numbers = ("windows", "window", "batch", "steps")
    words = [word for name in numbers for word in (f"--{name}", str(getattr(asked, name)))]
    words += ["--shape", asked.shape, "--part", part, "--folder", folder]
    words += [] if train is None else ["--train", train]
    command = [sys.executable, "-m", "bench.quality.scale", *words]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    label = part if train is None else f"{part} {train}"
    print(f"{label}: {time.perf_counter() - started:.0f} s in all", flush=True)
    if done.returncode:
        print(f"{label} failed with exit code {done.returncode}", flush=True)
        return []
    row = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), flush=True)
    if asked.out is not None:
        append_jsonl(asked.out, [row], provenance())
    return [row]


def _one(asked: argparse.Namespace) -> int:
    run: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "collect": _collect,
        "train": _train,
        "calibrate": _calibrate,
        "tune": _tune,
    }
    with show_lines():
        row = run[asked.part](asked)
    peak, limit = peak_memory(), device_memory()
    planned = row.get("planned", {}).get("total")
    row = {"shape": asked.shape, "part": asked.part} | row | {"peak": peak, "limit": limit}
    if planned is not None:
        row["planned_gb"] = planned / 1e9
    if peak is not None and row.get("ran", True) and planned is not None:
        row |= {"peak_gb": peak / 1e9, "ratio": peak / planned}
    print(json.dumps(row))
    return 0


def _model(shape: str) -> pj.Decoder:
    """Random weights in bfloat16, made on the device."""
    return pj.Decoder(SHAPES[shape], rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.bfloat16))


def _windows(asked: argparse.Namespace) -> np.ndarray:
    size = (asked.windows, asked.window)
    return np.random.default_rng(0).integers(3, SHAPES[asked.shape].vocab_size, size, np.int32)


def _folder(asked: argparse.Namespace) -> Path:
    return Path(asked.folder) / asked.shape


def _collect(asked: argparse.Namespace) -> dict[str, Any]:
    """Records the last few of the layers that would be recorded at a time for `TOKENS` tokens."""
    model, windows, options = _model(asked.shape), _windows(asked), CollectOptions(max_bytes=DISK)
    whole = plan_recording(model, (TOKENS // asked.window, asked.window), options, in_parts=True)
    here = plan_recording(model, windows.shape, CollectOptions(max_bytes=DISK, held_out=(0.3, 0.05)))
    layers = whole.parts[-1]
    batch = min(options.batch_size, len(windows))
    planned = footprint.collecting_memory(model, asked.window, here, batch, layers)
    means, folder = means_of(model, windows, here, batch), _folder(asked)
    call = {"layers": layers, "means": means, "batch_size": batch, "overwrite": True}
    record(model, windows, here, folder, **call)  # also compiles
    started = time.perf_counter()
    recorded = record(model, windows, here, folder, **call)
    seconds = time.perf_counter() - started
    disk = sum(file.stat().st_size for file in _folder(asked).rglob("*.npy"))
    return {
        "tokens": recorded.num_tokens,
        "seconds_per_1k_tokens": 1000 * seconds / recorded.num_tokens,
        "planned": planned,
        "disk_gb": disk / 1e9,
        "disk_planned_gb": recorded.num_tokens * row_bytes(recorded.config, model.dtype) / 1e9,
        "whole_disk_gb": whole.num_bytes / 1e9,
        "note": f"{TOKENS:,} tokens: {whole}",
    }


def _recorded(asked: argparse.Namespace) -> Activations:
    try:
        return open_activations(_folder(asked))
    except pj.InputError as error:
        raise SystemExit(f"{error}. Hint: run the part collect first, in the same call") from None


def _train(asked: argparse.Namespace) -> dict[str, Any]:
    """Two epochs of training the recorded layers' routers, with the text cut in two; the second call is timed."""
    recorded = _recorded(asked)
    tokens = len(recorded.rows("train"))
    each = row_bytes(recorded.config, recorded.dtype)
    options = TrainOptions(max_epochs=1, memory_bytes=tokens * each * 2 // 3)
    planned = footprint.training_memory(recorded.config, recorded.dtype, tokens, options)
    train_routers(recorded, recorded.config, jax.random.key(0), options=options)  # also compiles
    started = time.perf_counter()
    train_routers(recorded, recorded.config, jax.random.key(0), options=options)
    seconds = time.perf_counter() - started
    return {
        "tokens": tokens,
        "seconds_per_1k_tokens": 1000 * seconds / tokens,
        "planned": planned,
        "note": f"an epoch of {recorded.config.num_layers} layers, with reading and validation",
    }


def _calibrate(asked: argparse.Namespace) -> dict[str, Any]:
    """Calibrates the recorded layers with untrained routers."""
    recorded = _recorded(asked)
    config, held_out = recorded.config, len(recorded.rows("validation"))
    sizes = tuple(size for size in CalibrateOptions().batch_sizes if size <= held_out)
    options = CalibrateOptions(batch_sizes=sizes)
    one = part_of(config, range(1))
    made = (init_routers(one, jax.random.key(i)).layers[0] for i in range(config.num_layers))
    layers = tuple(jax.tree.map(lambda leaf: leaf.astype(recorded.dtype), layer) for layer in made)
    routers = Routers(layers, recorded.fingerprint, recorded.importance)
    planned = footprint.calibrating_memory(config, recorded.dtype, held_out, options)
    started = time.perf_counter()
    calibrate(recorded, routers, config, key=jax.random.key(1), options=options)
    seconds = time.perf_counter() - started
    found = {"tokens": held_out, "seconds_per_1k_tokens": 1000 * seconds / held_out}
    if planned is None:
        return found | {"note": "no neurons to calibrate"}
    return found | {"planned": planned, "note": f"{config.num_layers} layers, {len(sizes)} batch sizes"}


def _tune(asked: argparse.Namespace) -> dict[str, Any]:
    """A few steps of tuning, if the plan says that they fit."""
    (train,) = asked.train
    model, windows = _model(asked.shape), _windows(asked)
    options = TuneOptions(
        tokens=asked.steps * asked.batch * asked.window, batch_size=asked.batch, train=train
    )
    routers = _routers(model)
    row: dict[str, Any] = {"train": train, "batch": asked.batch, "tokens": options.tokens}
    plan = tuning_setup.setup(model, routers, options, asked.window, 1)
    row |= {"planned": plan.memory}
    if not plan.fits():
        return row | {"ran": False, "note": "refused: does not fit"}
    with _timed_steps() as seconds:
        *_, report = tuning.tune(model, routers, [windows], 0, options=options)
    each = statistics.median(seconds[1:])
    return row | {
        "planned": report.memory,
        "seconds_per_step": each,
        "seconds_per_1k_tokens": 1000 * each / (asked.batch * asked.window),
        "note": f"tune --train {train}, {asked.batch} windows a step",
    }


def _routers(model: pj.Decoder) -> Routers:
    """Untrained group routers with mean outputs, as `sparsify` makes them."""
    config = model.config
    mean = jnp.zeros((config.num_kv_heads, config.d_model))
    made = init_routers(config, jax.random.key(0), neurons=False)
    layers = [jax.tree.map(lambda leaf: leaf.astype(model.dtype), layer) for layer in made.layers]
    filled = tuple(LayerRouter(None, None, each.w_group, each.b_group, mean) for each in layers)
    return Routers(filled, importance="contributions")


class _timed_steps:
    """Within the block, every step of tuning is waited for and timed; yields the seconds."""

    def __enter__(self) -> list[float]:
        self._original, seconds = tuning._Run._step, []
        original = self._original

        def timed(run: Any, *arguments: Any) -> Any:
            started = time.perf_counter()
            parts = jax.block_until_ready(original(run, *arguments))
            seconds.append(time.perf_counter() - started)
            return parts

        tuning._Run._step = timed  # pyrefly: ignore[bad-assignment]
        return seconds

    def __exit__(self, *_: object) -> None:
        tuning._Run._step = self._original


if __name__ == "__main__":
    raise SystemExit(main())
