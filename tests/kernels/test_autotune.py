"""Tuned tiles: the search with a made-up clock, files that are checked when read, what ships, the command."""

import dataclasses
import json
import subprocess
import sys

import pytest

from bench.bench_decode_attention import problem_of
from bench.report import ROOT, read_jsonl
from bench.workloads import MODELS, AttentionCase, attention_cases
from pallas_kernels._device import HOPPER
from pallas_kernels.autotune import __main__ as command
from pallas_kernels.autotune import measure, tuned
from pallas_kernels.decode_attention.tiles import OP, Problem, Tiles, choose, heuristic

PROBLEM = Problem(batch=2, groups=4, queries=1, width=64, capacity=512, selected=2)
ENTRY = tuned.Entry(
    op=OP,
    device=HOPPER.kind,
    dtype="bfloat16",
    shapes=dict(vars(PROBLEM)),
    tiles={"block": 256, "stages": 1, "splits": 1},
    time_us=10.0,
    jax="1",
    commit="c",
)


def search(times, *, spread=1.0, wrong=()):
    """The search over the names in `times`, whose values are seconds, or what is raised."""

    def run(name):
        if isinstance(times[name], Exception):
            raise times[name]
        return lambda: name

    return measure.search(
        times, run, right=lambda name: name not in wrong, timer=lambda call: (times[call()], spread)
    )


@pytest.mark.parametrize(
    ("times", "wrong", "best"),
    [
        ({"first": 20.0, "second": 10.0, "third": 30.0}, (), "second"),
        ({"first": 20.0, "second": 18.5}, (), "first"),  # within the spreads of both
        ({"first": 20.0, "second": 10.0}, ("second",), "first"),
        ({"first": RuntimeError("no room"), "second": 10.0}, (), "second"),
    ],
)
def test_search_takes_what_is_clearly_faster_and_right(times, wrong, best):
    assert search(times, wrong=wrong).tiles == best


def test_search_without_a_right_result_is_an_error():
    with pytest.raises(ValueError, match="no configuration gave a right result"):
        search({"first": 1.0, "second": OSError("x")}, wrong=("first",))


def test_tune_measures_the_heuristics_choice_first(monkeypatch, capsys):
    class Calls:
        def run(self, tiles):
            return lambda: tiles

        def right(self, tiles):
            return tiles.stages < 3

    def timer(call):
        return (1e-6 if call() == Tiles(block=128, stages=2) else 2e-6), 1e-8

    entry = command.tune(PROBLEM, "bfloat16", device=HOPPER, calls=Calls(), timer=timer)
    assert entry.tiles == {"block": 128, "stages": 2, "splits": 1}
    assert entry.time_us == pytest.approx(1.0)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(str(heuristic(PROBLEM, HOPPER)))
    assert any("wrong result" in line for line in others)


def test_measuring_runs_here_too():
    """The operands, the comparison and the clock: all but the kernel itself."""
    calls = command.Calls(PROBLEM, "bfloat16", HOPPER)
    assert len(calls.sets) == measure.sets_needed(2 * 2 * 512 * 64 * 4)
    assert calls.right((calls.want.astype("float32"),))
    assert not calls.right((calls.want.astype("float32") * 1.1,))
    seconds, spread = measure.device_timer(lambda: calls.q, repeats=2)
    assert seconds > 0
    assert spread >= 0


# ---- files


@pytest.fixture
def chosen_from(monkeypatch):
    def read(path):
        monkeypatch.setenv(tuned.VARIABLE, str(path))
        tuned._known.cache_clear()

    yield read
    monkeypatch.undo()
    tuned._known.cache_clear()


def test_what_was_written_is_chosen_for_that_call_alone(tmp_path, chosen_from):
    path = tmp_path / "tuned.json"
    tuned.write(path, [dataclasses.replace(ENTRY, time_us=20.0)])
    tuned.write(path, [ENTRY, dataclasses.replace(ENTRY, dtype="float16")])
    assert tuned.load(path) == (ENTRY, dataclasses.replace(ENTRY, dtype="float16"))
    chosen_from(path)
    assert choose(PROBLEM, "bfloat16", HOPPER) == Tiles(block=256, stages=1, splits=1)
    other = dataclasses.replace(PROBLEM, batch=3)
    assert choose(other, "bfloat16", HOPPER) == heuristic(other, HOPPER)
    elsewhere = dataclasses.replace(HOPPER, kind="NVIDIA H100")
    assert choose(PROBLEM, "bfloat16", elsewhere) == heuristic(PROBLEM, elsewhere)


@pytest.mark.parametrize(
    ("tiles", "match"),
    [
        ({"block": 96}, "block must be"),
        ({"block": 64, "depth": 2}, "wrong names"),
        ({"block": 256, "stages": 16}, "shared memory"),
    ],
)
def test_tiles_of_a_file_that_can_not_be_are_an_error(tmp_path, chosen_from, tiles, match):
    path = tmp_path / "tuned.json"
    tuned.write(path, [dataclasses.replace(ENTRY, tiles=tiles)])
    chosen_from(path)
    with pytest.raises(ValueError, match=match):
        choose(PROBLEM, "bfloat16", HOPPER)


GOOD = dataclasses.asdict(ENTRY)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "can't be read"),
        ("[]", "not of this format"),
        (json.dumps({"format": 2, "entries": []}), "not of this format"),
        (json.dumps({"format": 1, "entries": {}}), "no list of entries"),
        (json.dumps({"format": 1, "entries": [{"op": OP}]}), "entry 0: wrong names"),
        (json.dumps({"format": 1, "entries": [GOOD, GOOD]}), "entry 1: repeats"),
        (json.dumps({"format": 1, "entries": [GOOD | {"time_us": -1}]}), "entry 0: time_us"),
        (json.dumps({"format": 1, "entries": [GOOD | {"tiles": {"block": "64"}}]}), "entry 0: tiles"),
        (json.dumps({"format": 1, "entries": [GOOD | {"device": ""}]}), "entry 0: device"),
    ],
)
def test_files_are_checked(tmp_path, text, match):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=match) as caught:
        tuned.load(path)
    assert "\n" not in str(caught.value)


# ---- what ships


def test_shipped_tiles_are_those_of_the_sweep():
    """Each is a row of the sweep, with its time, device, versions and commit, and nothing there was clearly faster."""
    cases = {str(case): problem_of(case) for case in attention_cases()}
    sweep: dict[Problem, list[dict]] = {}
    for row in read_jsonl(ROOT / "bench" / "results" / "decode_attention_sweep.jsonl"):
        sweep.setdefault(cases[row["case"]], []).append(row)
    for entry in tuned.load(tuned.SHIPPED / "nvidia-h200.json"):
        problem = Problem(**entry.shapes)
        tiles = choose(problem, entry.dtype, HOPPER)
        rows = sweep[problem]
        (row,) = (row for row in rows if {name: row[name] for name in entry.tiles} == entry.tiles)
        assert vars(tiles) == entry.tiles
        assert entry.time_us == pytest.approx(row["time_us"], rel=1e-3)
        assert [entry.device, entry.jax, entry.commit] == [row[key] for key in ("device", "jax", "commit")]
        assert all(
            row["time_us"] - other["time_us"] <= row["spread_us"] + other["spread_us"] for other in rows
        )


def test_a_shipped_value_replaces_the_heuristics():
    problem = problem_of(AttentionCase(MODELS["opt-6.7b"], 16, 1920, 1.0))
    assert heuristic(problem, HOPPER).stages == 2
    assert choose(problem, "bfloat16", HOPPER) == Tiles(block=64, stages=3, splits=1)
    assert choose(problem, "float16", HOPPER) == heuristic(problem, HOPPER)


# ---- the command

SIZES = "--batch 2 --groups 4 --queries 1 --width 64 --capacity 512 --selected 2".split()


def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    path = tmp_path / "tuned.json"
    assert command.main([OP, *SIZES, "--output", str(path)]) == 1
    assert capsys.readouterr().err == "autotune: needs an NVIDIA Hopper GPU; got cpu\n"
    assert not path.exists()


def test_command_writes_a_file(tmp_path, capsys, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(command._device, "current", lambda: HOPPER)
    monkeypatch.setattr(command, "tune", lambda problem, dtype, device: ENTRY)
    assert command.main([OP, *SIZES, "--output", str(path)]) == 0
    assert tuned.load(path) == (ENTRY,)


@pytest.mark.parametrize(
    ("more", "match"), [(["--width", "40"], "multiple of 16"), (["--batch", "0"], "must be positive")]
)
def test_command_refuses_what_the_kernel_can_not_do(tmp_path, capsys, monkeypatch, more, match):
    monkeypatch.setattr(command._device, "current", lambda: HOPPER)
    assert command.main([OP, *SIZES, *more, "--output", str(tmp_path / "x.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line


def test_help():
    run = [sys.executable, "-m", "pallas_kernels.autotune", "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--capacity" in done.stdout
