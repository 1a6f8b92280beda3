"""Measures the tiles of an operation on this machine's GPU and writes the fastest ones as JSON.

    python3 -m pallas_kernels.autotune sparse_decode_attention \\
        --batch 16 --groups 8 --queries 4 --width 128 --capacity 8192 --selected 2 --output tuned.json
    python3 -m pallas_kernels.autotune sparse_mlp \\
        --batch 16 --d-model 9216 --neurons 36864 --selected 3712 --output tuned.json

Set PALLAS_KERNELS_TUNED=tuned.json to use them in calls of these shapes. Selection has no tiles to tune.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import _device
from pallas_kernels._tuned import lookup as tuned
from pallas_kernels.autotune import measure
from pallas_kernels.autotune.attention import Attention
from pallas_kernels.autotune.mlp import Mlp

SUBJECTS: dict[str, type[Attention] | type[Mlp]] = {subject.op: subject for subject in (Attention, Mlp)}


def tune(
    subject: Attention | Mlp,
    *,
    timer: Callable[[Callable[[], Any]], tuple[float, float]] = measure.host_timer,
) -> tuned.Entry:
    """Measures one call on its device and returns its file entry. Prints one line per candidate."""
    best = measure.search(
        subject.candidates(),
        subject.run,
        right=subject.right,
        timer=timer,
        report=lambda trial: print(trial, flush=True),
    )
    return tuned.Entry(
        op=subject.op,
        device=subject.device.kind,
        dtype=subject.dtype,
        shapes=subject.shapes,
        tiles=subject.stored(best.tiles),
        time_us=best.seconds * 1e6,
        jax=jax.__version__,
        commit=_commit(),
    )


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m pallas_kernels.autotune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    operations = parser.add_subparsers(dest="op", required=True)
    for op, subject in SUBJECTS.items():
        own = operations.add_parser(op, help=f"see {op} --help")
        subject.add_arguments(own)
        own.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
        own.add_argument(
            "--output", type=Path, required=True, help="JSON file; entries for other calls are kept"
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if the file was written, else 1 after one line on stderr."""
    args = _parser().parse_args(arguments)
    try:
        device = _device.current()
        _device.require_hopper(device)
        if args.output.exists():
            tuned.load(args.output)  # refuses an invalid file before the long measurement
        entry = tune(SUBJECTS[args.op].of(args, device))
        tuned.write(args.output, [entry])
    except (NotImplementedError, ValueError, OSError) as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {entry}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
