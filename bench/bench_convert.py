"""How fast checkpoints are converted and exported, compared with a plain copy of the same bytes on the same disk.

    python -m bench.bench_convert --layers 15 --folder SOMEWHERE

writes a LLaMA-shaped bfloat16 checkpoint of about 0.13 GB per layer plus 0.26 GB, then copies, converts and exports it,
in turns. Each time, the source is dropped from the page cache, the machine's memory was just in use, and the result is
flushed to disk. The folder is emptied at the end. Seconds are medians; "cpu_seconds" counts all threads; "of_copy" is
the time divided by the copy's, "best" the same for the shortest times; "load" is the machine's, including other
processes.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from checkpoints_convert import convert_checkpoint, export_checkpoint
from tests.convert import big

COLUMNS = ("work", "GB", "seconds", "cpu_seconds", "GB_per_s", "of_copy", "best")


def copy(source: Path, target: Path) -> None:
    """A plain copy, flushed to disk."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb") as stream:
            os.fsync(stream.fileno())


def chill(folder: Path) -> None:
    """Asks the system to drop the files of a folder from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory(size: int) -> None:
    """Uses and frees `size` bytes: a virtual machine may get memory from its host more slowly than a disk reads."""
    memory = [np.ones(1 << 26, np.uint8) for _ in range(-(-size >> 26))]
    memory.clear()


def timed(work: Callable[[Path, Path], Any], source: Path, target: Path) -> tuple[float, float]:
    """Seconds of one run from a cold source: wall time, and CPU time of all threads."""
    chill(source)
    touch_memory(3 * sum(file.stat().st_size for file in source.rglob("*") if file.is_file()))
    started, used = time.perf_counter(), time.process_time()
    work(source, target)
    return time.perf_counter() - started, time.process_time() - used


def measure(folder: Path, layers: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    total, _ = big.write(folder / "hf", layers=layers)
    runs: dict[str, list[tuple[float, float]]] = {"copy": [], "convert": [], "export": []}
    for _ in range(repeats):
        runs["copy"].append(timed(copy, folder / "hf", folder / "copy"))
        shutil.rmtree(folder / "copy")
        runs["convert"].append(timed(convert_checkpoint, folder / "hf", folder / "model"))
        runs["export"].append(timed(export_checkpoint, folder / "model", folder / "back"))
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "back")
    seconds = {work: [each for each, _ in pairs] for work, pairs in runs.items()}
    middle = {work: statistics.median(each) for work, each in seconds.items()}
    return [
        {
            "work": work,
            "GB": total / 1e9,
            "seconds": middle[work],
            "cpu_seconds": statistics.median(used for _, used in runs[work]),
            "GB_per_s": total / 1e9 / middle[work],
            "of_copy": middle[work] / middle["copy"],
            "best": min(seconds[work]) / min(seconds["copy"]),
            "all_seconds": [round(each, 2) for each in seconds[work]],
        }
        for work in seconds
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=15, help="layers of the checkpoint, 0.13 GB each")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement")
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; default: the temporary folder"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), args.layers, args.repeats)
    print(report.table(rows, COLUMNS))
    if path := report.results_path("convert.jsonl"):
        machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[1], "orbax": version("orbax-checkpoint")}
        report.append_jsonl(path, rows, report.provenance(**machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
