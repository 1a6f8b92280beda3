"""Predicts decoding steps on several GPUs and hosts, and compares them with those that were measured.

    python3 -m bench.many_gpus                writes bench/many_gpus.md

A step is predicted as its floor (the bytes of one device at copy bandwidth, and what the devices exchange), plus a time
per layer that steps on one GPU take on top of their bytes, plus a time per exchange that steps on two GPUs take on top
of both. These times are means over the rows of bench/results/decode.jsonl and bench/results/decode_mesh.jsonl.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from bench import report
from bench.models import LARGE_SHAPES, ROOM, DecodeShape, shape_of
from bench.readme_tables import NAMES
from polarjax import costs
from polarjax.model.exchanges import NVLINK, exchanges
from polarjax.model.mesh_shape import MeshShape
from polarjax.selection.plans import SparsityPlan

PAGE = Path(__file__).parent / "many_gpus.md"
ONE, MANY = (Path(__file__).parent / "results" / name for name in ("decode.jsonl", "decode_mesh.jsonl"))
USABLE = 0.95  # of a GPU's memory
NETWORK = 40e-6  # seconds in which all hosts agree whether to go on; an assumption
TEXT = """# Many GPUs: predicted steps

Made by `python -m bench.many_gpus`. **Everything on this page is predicted, unless a column says measured.** The last
table compares steps that were measured on two GPUs with what is predicted for them.

A step is predicted as one device's bytes (`costs.decode_bytes` of a mesh) at {bandwidth:,.0f} GB/s, the copy bandwidth
of an H200; plus what the devices exchange (`costs.step_floor`); these two are the floor. On top of them it takes, by
our measured rows,

- for each layer, as on one H200: {overheads};
- for each exchange, as on two H200s: {waiting}. It is what a step takes longer than all of the above; where heads are
  skipped it is less, because the kernel that sums also does what small kernels do on one GPU. The rows of two GPUs have
  the host's part of a call in them, .1 to .3 ms a step, which the exchanges are made responsible for here.

What is assumed, not measured:

- An H100 copies at {h100:,.0f} GB/s: the H200's bandwidth times the ratio of the nominal ones (3.35 and 4.8 TB/s).
- Sums were measured over two H200s, without NVLink multicast. In our kernel: {sums}.
  Each of n devices sends its operand to the n - 1 others. By NCCL: {points}.
  A ring of n devices sends 2(n - 1)/n times the operand, in 2(n - 1) steps; each step beyond two adds {hop:.2f} µs.
  An all-to-all is half an all-reduce.
- Nothing is exchanged while something else is computed.
- Between hosts only sequences are divided. All they exchange is whether to go on, {network:.0f} µs a step.

Weights, cache and activations are bfloat16, the densities the published critical ones. With attention by groups, the
groups kept are rounded up to a multiple of the devices; where these are all groups, and no neurons are skipped either,
there is no sparse step. Batches are listed if they fit {usable:.0%} of a GPU's memory, {room:.1f} GB of it for
temporaries, and the largest that fits is added.
"""


class Gpu(NamedTuple):
    """A GPU's name, memory in bytes and copy bandwidth in bytes per second."""

    name: str
    memory: float
    bandwidth: float


class Overheads(NamedTuple):
    """Seconds that each layer of a step takes on one GPU on top of its bytes, and the copy bandwidth in bytes/s."""

    seconds: dict[tuple[str, str], float]
    bandwidth: float

    def of(self, shape: DecodeShape, plan: SparsityPlan | None) -> float:
        """A layer's time for this model's family, dense or sparse."""
        return self.seconds[shape.name.partition("-")[0], "dense" if plan is None else "sparse"]


@functools.cache
def overheads() -> Overheads:
    """From the rows of one GPU with a batch of 16 or more, the last of each case and kind."""
    rows = {(row["case"], row["kind"]): row for row in report.read_jsonl(ONE) if "XLA" not in row["kind"]}
    found: dict[tuple[str, str], list[float]] = {}
    for (case, kind), row in rows.items():
        shape, batch = shape_of(case.split()[0]), int(case.split()[1][1:])
        if shape.config.num_layers > 1 and batch >= 16 and (kind == "dense" or kind == shape.kind(batch)):
            spare = row["ms_per_step"] / 1e3 - row["bytes"] / row["copy_gbps"] / 1e9
            key = shape.name.partition("-")[0], "dense" if kind == "dense" else "sparse"
            found.setdefault(key, []).append(spare / shape.config.num_layers)
    bandwidth = median(row["copy_gbps"] for row in rows.values()) * 1e9
    return Overheads({key: mean(each) for key, each in found.items()}, bandwidth)


@dataclasses.dataclass(frozen=True)
class Step:
    """A decoding step on a mesh of GPUs.

    Attributes:
      shape: the model.
      batch: B, over all devices.
      mesh: the devices.
      sparse: whether heads and neurons are skipped at the published densities.
    """

    shape: DecodeShape
    batch: int
    mesh: MeshShape
    sparse: bool

    @property
    def plan(self) -> SparsityPlan | None:
        """What is kept; None if dense, or if nothing can be skipped."""
        plan = self.shape.plan(self.batch, neurons=True, mesh=self.mesh) if self.sparse else None
        return None if plan is None or not any((*plan.neurons, *plan.groups)) else plan

    def floor(self, bandwidth: float) -> tuple[float, float]:
        """Seconds for one device's bytes, and for the exchanges."""
        call: dict[str, Any] = {"batch_size": self.batch, "cache_length": self.shape.cache, "plan": self.plan}
        return costs.step_floor(self.shape.config, mesh=self.mesh, bandwidth=bandwidth, **call)

    @property
    def exchanges(self) -> int:
        """How many collectives a step has."""
        found = exchanges(self.shape.config, self.mesh, batch_size=self.batch)
        return sum(each.count for each in found)

    def without_waiting(self, bandwidth: float) -> float:
        """Seconds that the step would take if exchanges took no longer than alone."""
        layers = self.shape.config.num_layers * overheads().of(self.shape, self.plan)
        return sum(self.floor(bandwidth)) + layers

    def predicted(self, bandwidth: float) -> float:
        """Seconds that the step will take."""
        each = waiting().get((self.mesh.attention, self.plan is not None), 0.0)
        return self.without_waiting(bandwidth) + self.exchanges * each


def largest(shape: DecodeShape, mesh: MeshShape, gpu: Gpu) -> int:
    """The largest batch that fits, rounded down to 16 for each index of `data`; 0 if that is none."""
    room = {"memory": USABLE * gpu.memory - ROOM, "cache_length": shape.cache}
    return costs.largest_batch(shape.config, mesh=mesh, **room) // (16 * mesh.data) * 16 * mesh.data


def host_rows(shape: DecodeShape, gpu: Gpu) -> Iterator[list[str]]:
    """The table of one model on 2, 4 and 8 GPUs of a host."""
    for devices in (2, 4, 8):
        for attention in ("groups", "sequences"):
            mesh = MeshShape(model=devices, attention=attention)
            most = largest(shape, mesh, gpu)
            for batch in sorted({batch for batch in (*shape.batches, most) if 0 < batch <= most}):
                weights = costs.weights_bytes(shape.config, mesh=mesh)
                cache = shape.memory(batch, mesh) - weights - ROOM
                head = [str(devices), attention, f"{batch}", f"{weights / 1e9:.1f} + {cache / 1e9:.1f}"]
                yield head + _times(Step(shape, batch, mesh, sparse=False), gpu.bandwidth)


def _times(dense: Step, bandwidth: float) -> list[str]:
    sparse = dataclasses.replace(dense, sparse=True)
    reading, exchanging = dense.floor(bandwidth)
    cells = [f"{reading * 1e3:.1f} + {exchanging * 1e3:.1f}", f"{dense.predicted(bandwidth) * 1e3:.1f}"]
    if sparse.plan is None:
        return [*cells, *["nothing to skip"] * 2, "-", "-"]
    cells += [f"{sum(sparse.floor(bandwidth)) * 1e3:.1f}", f"{sparse.predicted(bandwidth) * 1e3:.1f}"]
    rate = dense.batch / sparse.predicted(bandwidth)
    return [*cells, f"{rate:,.0f}", f"{dense.predicted(bandwidth) / sparse.predicted(bandwidth):.2f} ×"]


HOST = (
    *("GPUs", "attention by", "batch", "GB a device: weights + cache"),
    *("dense floor, ms: memory + exchanges", "dense, ms", "sparse floor, ms", "sparse, ms"),
    *("sparse, tokens/s", "sparse over dense"),
)


def many_hosts(gpu: Gpu) -> Iterator[list[str]]:
    """The largest batch on 2 to 16 hosts of eight GPUs."""
    for shape in LARGE_SHAPES.values():
        for hosts in (2, 4, 8, 16):
            mesh = MeshShape(
                data=hosts, model=8, attention="sequences" if shape.config.num_kv_heads == 8 else "groups"
            )
            batch = largest(shape, mesh, gpu)
            cells = [shape.name, str(hosts), str(hosts * 8), mesh.attention]
            dense, sparse = (Step(shape, batch, mesh, sparse=sparse) for sparse in (False, True))
            times = [step.predicted(gpu.bandwidth) + NETWORK for step in (dense, sparse)]
            cells += [f"{batch:,}", *(f"{seconds * 1e3:.1f}" for seconds in times)]
            yield [*cells, *(f"{batch / seconds:,.0f}" for seconds in times)]


HOSTS = (
    *("model", "hosts", "GPUs", "attention by", "largest batch"),
    *("dense, ms", "sparse, ms", "dense, tokens/s", "sparse, tokens/s"),
)


def measured() -> Iterator[tuple[dict[str, Any], Step]]:
    """Rows of several GPUs, the last of each call, and their steps."""
    rows = report.read_jsonl(MANY) if MANY.is_file() else []
    last = {
        (r["case"], r["kind"], r["data"], r["model"], r["attention"]): r for r in rows if r["devices"] > 1
    }
    for row in last.values():
        shape, batch = shape_of(row["case"].split()[0]), int(row["case"].split()[1][1:])
        mesh = MeshShape(row["data"], row["model"], row["attention"])
        if row["kind"] in ("dense", shape.kind(mesh.rows(batch))):
            yield row, Step(shape, batch, mesh, sparse=row["kind"] != "dense")


@functools.cache
def waiting() -> dict[tuple[str, bool], float]:
    """Seconds that each exchange takes in a step on top of what it takes alone, by what attention divides and whether
    the step is sparse; empty without rows."""
    found: dict[tuple[str, bool], list[float]] = {}
    for row, step in measured():
        if step.exchanges:
            spare = row["ms_per_step"] / 1e3 - step.without_waiting(row["copy_gbps"] * 1e9)
            kind = step.mesh.attention, step.plan is not None
            found.setdefault(kind, []).append(spare / step.exchanges)
    return {kind: mean(each) for kind, each in found.items()}


def compared() -> Iterator[list[str]]:
    """Measured rows of several GPUs beside their predictions."""
    for row, step in measured():
        mesh, found = step.mesh, row["ms_per_step"]
        predicted = step.predicted(row["copy_gbps"] * 1e9) * 1e3
        how = f"data={mesh.data}, model={mesh.model}" + (f", by {mesh.attention}" if mesh.model > 1 else "")
        cells = [row["case"], row["kind"], row["device"], how, f"{predicted:.2f}", f"{found:.2f}"]
        yield [*cells, f"{100 * (predicted / found - 1):+.0f} %"]


COMPARED = ("case", "kind", "GPU", "mesh", "predicted, ms", "measured, ms", "predicted over measured")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """The page's text."""
    known = overheads()
    gpus = (Gpu("H200", 141e9, known.bandwidth), Gpu("H100", 80e9, known.bandwidth * 3.35 / 4.8))
    families = {name.partition("-")[0]: NAMES[name].partition("-")[0] for name in LARGE_SHAPES}
    spent = [
        f"{families[family]} {kind} {1e6 * each:.0f} µs"
        for (family, kind), each in known.seconds.items()
        if family in families
    ]
    points, sums = (
        ", ".join(f"{1e6 * seconds:g} µs for {size // 1024:g} KB" for size, seconds in each)
        for each in (NVLINK.points, NVLINK.sums)
    )
    values = {"bandwidth": known.bandwidth / 1e9, "h100": gpus[1].bandwidth / 1e9, "room": ROOM / 1e9}
    values |= {
        "overheads": ", ".join(spent),
        "points": points,
        "sums": sums,
        "hop": 1e6 * NVLINK.hop,
        "usable": USABLE,
    }
    waits = [
        f"{'sparse' if sparse else 'dense'} by {attention} {1e6 * each:.0f} µs"
        for (attention, sparse), each in waiting().items()
    ]
    values |= {"waiting": ", ".join(waits) or "not measured"}
    parts = [TEXT.format(**values, network=1e6 * NETWORK)]
    for gpu in gpus:
        for shape in LARGE_SHAPES.values():
            parts += [f"## {shape.name} on one host of {gpu.name}s, cache {shape.cache:,}\n"]
            parts += [
                f"Predicted, not measured. Sparse: {shape.kind(shape.batches[-1])} at the largest listed batch.\n"
            ]
            rows = list(host_rows(shape, gpu))
            parts += [table(HOST, rows) + "\n" if rows else "It doesn't fit eight of them.\n"]
    parts += [
        "## Hosts of eight H200s\n\nPredicted, not measured. Every host has the whole model and its own sequences.\n"
    ]
    parts += [table(HOSTS, list(many_hosts(gpus[0]))) + "\n", "## Predictions against measured steps\n"]
    rows = list(compared())
    parts += [
        table(COMPARED, rows) + "\n" if rows else "Not measured: there are no rows of several GPUs yet.\n"
    ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(report.ROOT)}: {PAGE.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
