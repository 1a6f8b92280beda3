"""The benches where there is no GPU: help for all, one line instead of numbers, and no time for a wrong result."""

import importlib
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bench import bench_selection, check_sparse_mlp, workloads
from bench.check_sparse_mlp import checks, kind
from bench.models import TINY
from bench.report import ROOT, read_jsonl
from polarjax import costs
from polarjax.model.mesh_shape import MeshShape

GPU = (
    "bench_decode_attention",
    "bench_sparse_mlp",
    "bench_selection",
    "bench_decode",
    "bench_prefill",
    "bench_generate",
    "bench_all_reduce_norm",
)
TORCH = ("bench_torch",)
VERBLESS = ("read_floor", "step_parts")  # on a GPU, too
CPU = (
    "bench_convert",
    "bench_load",
    "bench_startup",
    "roofline",
    "readme_tables",
    "pictures",
    "server_runs",
    "many_gpus",
)


def run(monkeypatch, name: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return importlib.import_module(f"bench.{name}").main()


@pytest.mark.parametrize("name", [*GPU, *TORCH, *VERBLESS, *CPU, "check_sparse_mlp"])
def test_help(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, name, "--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        *((name, ["table"]) for name in GPU),
        *((name, ["check"]) for name in GPU[:3]),
        *((name, []) for name in VERBLESS),
        ("check_sparse_mlp", ["fused"]),
    ],
)
def test_without_a_gpu_one_line_says_so(monkeypatch, name, verb):
    with pytest.raises(SystemExit, match=r"^bench: needs an NVIDIA Hopper GPU; got cpu\. Hint: .*") as ended:
        run(monkeypatch, name, *verb)
    assert "\n" not in str(ended.value)


def test_without_pytorchs_gpu_one_line_says_so(monkeypatch):
    with pytest.raises(SystemExit, match=r"^bench: needs a GPU that PyTorch can use; got none\. Hint: .*"):
        run(monkeypatch, "bench_torch", "torch")


def test_every_bench_is_on_the_page():
    page = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    scripts = {
        path.stem for path in (ROOT / "bench").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    }
    assert scripts == {*GPU, *TORCH, *VERBLESS, *CPU, "check_sparse_mlp"}
    named = set(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", " ".join(named))) >= {
        *GPU,
        *TORCH,
        *VERBLESS,
        "bench_convert",
        "bench_load",
        "bench_startup",
    }
    numbers = (*workloads.BATCHES, *(f"{d:g}".lstrip("0") for d in workloads.DENSITIES))
    assert all(str(number) in page for number in numbers)


SCORES = np.asarray([[4.0, 3.0, 2.0, 1.0]])


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ([[0, 1]], 0.0),
        ([[0, 2]], 0.25),
        ([[1, 0]], np.inf),
        ([[0, 0]], np.inf),
        ([[0, 4]], np.inf),
        ([[-1, 0]], np.inf),
        ([[0]], np.inf),
    ],
)
def test_error_of_a_selection(found, error):
    assert bench_selection.error(np.asarray(found), SCORES, 2) == error


def test_a_wrong_selection_gets_no_time(monkeypatch):
    right = lambda scores, k, **options: jnp.arange(k)
    monkeypatch.setattr(bench_selection, "measure", lambda *given: {"time_us": 1.0})
    monkeypatch.setattr(bench_selection, "select_top_k", right)
    row = bench_selection._row("case", "mosaic", (2, 64), 8, 1.0, shared=True)
    assert row["wrong"]
    assert "time_us" not in row
    everything = bench_selection._row("case", "mosaic", (2, 64), 64, 1.0, shared=True)
    assert (everything["error"], everything["time_us"]) == (0, 1.0)


def test_named_selections_are_measured_once():
    cases = [*bench_selection.FIRST, *bench_selection.OTHERS]
    assert len(set(cases)) == len(cases) == 3 * 5 * 4


@pytest.mark.parametrize("which", check_sparse_mlp.KINDS)
def test_mlp_checks_name_existing_tiles(which):
    assert all(kind(check.tiles(which)) == which for check in checks(which))


def test_steps_on_a_mesh(tmp_path):
    """Without a GPU there is no floor and no share of exchanges."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    words = ["table", "--models", "tiny", "--devices", "2", "--batches", "2", "--attention", "sequences"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_decode", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "OUT": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_jsonl(tmp_path / "decode_mesh.jsonl")
    assert [(row["kind"], row["model"], row["attention"]) for row in rows] == [
        (kind, 2, "sequences") for kind in ("dense", "heads 0.5")
    ]
    assert rows[0]["tokens_per_s"] > 0 and rows[0]["exchange_pct"] is None
    mesh = MeshShape(model=2, attention="sequences")
    moved = costs.decode_bytes(TINY, batch_size=2, cache_length=56, mesh=mesh).total
    assert rows[0]["bytes"] == moved > rows[1]["bytes"]
