"""How fast a model directory is loaded onto one device, onto a mesh, and by two processes, compared with reading it.

    python -m bench.bench_load --layers 22 --folder SOMEWHERE

makes a LLaMA-shaped bfloat16 model directory of about 0.13 GB per layer plus 0.26 GB. "read" reads its files into one
block of memory; the other rows are `pj.load` in new processes, without their imports: on one CPU device, on a mesh of
eight, and by two processes with four devices each. All are measured in turns, each with the files dropped from the page
cache ("cold") and with them there; seconds are medians. "GB_per_s" counts the model once; "cpu_seconds" is of all
threads and processes; "read_GB" and "peak_GB", which includes what Python and JAX take, are of the process with most.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from bench.bench_convert import chill, touch_memory
from checkpoints_convert import convert_checkpoint
from tests.convert import big

COLUMNS = ("what", "files", "GB", "seconds", "GB_per_s", "cpu_seconds", "read_GB", "peak_GB")
WAYS = {
    "one device": (1, 1),
    "8 devices": (1, 8),
    "2 processes of 4 devices": (2, 4),
}  # processes, devices of each


def read(folder: Path) -> dict[str, float]:
    """Reads all files into the same memory."""
    memory = np.ones(1 << 23, np.uint8)
    started, used, count = time.perf_counter(), time.process_time(), 0
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb", buffering=0) as stream:
                while n := stream.readinto(memory.data):
                    count += n
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return {"seconds": seconds, "cpu_seconds": cpu, "read_GB": count / 1e9}


def load_once(model: str, devices: int, place: tuple[str, int, int] | None) -> None:
    """Loads in this process, which is one of several if it has a place among them; prints what that took."""
    import jax

    import polarjax as pj
    from polarjax import distributed

    if place is not None:
        distributed.initialize(*place)
    mesh = None if devices == 1 else jax.make_mesh((jax.device_count(),), ("model",))
    jax.block_until_ready(jax.device_put(0))
    load = pj.load  # imports what it needs
    before, started, used = _read_bytes(), time.perf_counter(), time.process_time()
    bundle = load(model, mesh=mesh)
    jax.block_until_ready(jax.tree.leaves(bundle.model))
    taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    taken["read_GB"] = (_read_bytes() - before) / 1e9
    print(json.dumps(taken | {"peak_GB": _of_this_process("status", "VmHWM:") * 1024 / 1e9}))


def _read_bytes() -> int:
    """What this process has read from files so far, cached or not."""
    return _of_this_process("io", "rchar:")


def _of_this_process(file: str, key: str) -> int:
    words = Path("/proc/self", file).read_text().split()
    return int(words[words.index(key) + 1])


def load(model: Path, processes: int, devices: int) -> dict[str, float]:
    """`load_once` in new processes: the longest time, all their CPU time, and the most bytes."""
    from polarjax.distributed.wire import free_port

    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    places = [(address, processes, i) if processes > 1 else None for i in range(processes)]
    code = "from bench.bench_load import load_once; load_once({!r}, {}, {!r})"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(str(model), devices, place)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=report.ROOT,
            env=environment,
        )
        for place in places
    ]
    texts = [each.communicate()[0] for each in started]
    if any(each.returncode for each in started):
        raise SystemExit("bench: a process that loads has failed; see above")
    found = [json.loads(text.splitlines()[-1]) for text in texts]
    combine = lambda key: (sum if key == "cpu_seconds" else max)(each[key] for each in found)
    return {key: combine(key) for key in found[0]}


def measure(folder: Path, layers: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    total, _ = big.write(folder / "hf", layers=layers)
    model = folder / "model"
    convert_checkpoint(folder / "hf", model)
    for file in (folder / "hf").iterdir():
        file.unlink()
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for what in ("read", *WAYS):
            for files in ("cold", "cached"):
                if files == "cold":
                    chill(model)
                touch_memory(total)
                once = read(model) if what == "read" else load(model, *WAYS[what])
                runs.setdefault((what, files), []).append(once)
    rows = []
    for (what, files), several in runs.items():
        middle = {key: statistics.median(each[key] for each in several) for key in several[0]}
        row = {"what": what, "files": files, "GB": total / 1e9, "GB_per_s": total / 1e9 / middle["seconds"]}
        rows.append(row | middle | {"all_seconds": [round(each["seconds"], 2) for each in several]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22, help="layers of the model, 0.13 GB each")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each measurement")
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; default: the temporary folder"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(Path(folder), args.layers, args.repeats)
    print(report.table(rows, COLUMNS))
    if path := report.results_path("load.jsonl"):
        machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[1], "tensorstore": version("tensorstore")}
        report.append_jsonl(path, rows, report.provenance(**machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
