"""Tuned tiles: the search with a made-up clock, files that are checked when read, what ships, the command."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bench.bench_decode_attention import problem_of
from bench.report import ROOT, read_jsonl
from bench.workloads import MODELS, AttentionCase, attention_cases
from pallas_kernels import _device, sparse_mlp
from pallas_kernels._device import HOPPER
from pallas_kernels._tuned import lookup as tuned
from pallas_kernels.autotune import __main__ as command
from pallas_kernels.autotune import measure
from pallas_kernels.autotune.attention import Attention
from pallas_kernels.autotune.mlp import Mlp
from pallas_kernels.decode_attention.tiles import OP, Problem, Tiles, choose, heuristic
from pallas_kernels.sparse_mlp import choice
from pallas_kernels.sparse_mlp import tiles as mlp_tiles
from pallas_kernels.sparse_mlp.mosaic import launch as mosaic

PROBLEM = Problem(batch=2, groups=4, queries=1, width=64, capacity=512, selected=2)
MLP = Mlp(batch=5, d_model=512, neurons=600, selected=256, gated=False, dtype="bfloat16", device=HOPPER)
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
        ({"first": AssertionError(), "second": 10.0}, (), "second"),
    ],
)
def test_search_takes_the_clearly_fastest_correct_tiles(times, wrong, best):
    assert search(times, wrong=wrong).tiles == best


def test_search_without_a_right_result_is_an_error():
    with pytest.raises(ValueError, match="no configuration gave a correct result"):
        search({"first": 1.0, "second": OSError("x")}, wrong=("first",))


@pytest.mark.parametrize("subject", [Attention(PROBLEM, "bfloat16", HOPPER), MLP], ids=lambda one: one.op)
def test_tune_measures_the_heuristics_choice_first(monkeypatch, capsys, subject):
    """The second candidate is twice as fast as the others, the third wrong and faster still."""
    first, second, third, *_ = subject.candidates()
    seconds = {second: 1e-6, third: 1e-7}
    monkeypatch.setattr(type(subject), "run", lambda self, tiles: lambda: tiles)
    monkeypatch.setattr(type(subject), "right", lambda self, tiles: tiles != third)
    entry = command.tune(subject, timer=lambda call: (seconds.get(call(), 2e-6), 1e-8))
    assert entry.tiles == subject.stored(second)
    assert entry.time_us == pytest.approx(1.0)
    assert (entry.op, entry.dtype, entry.device) == (subject.op, "bfloat16", HOPPER.kind)
    told, *others = capsys.readouterr().out.splitlines()
    assert told.startswith(str(first))
    assert any("wrong result" in line for line in others)


def test_heuristics_choices_come_first():
    assert next(Attention(PROBLEM, "float16", HOPPER).candidates()) == heuristic(PROBLEM, HOPPER)
    assert MLP.candidates()[0] == mlp_tiles.heuristic(5, 512, HOPPER, selected=256)


@pytest.mark.parametrize(
    ("subject", "touched"),
    [
        (Attention(PROBLEM, "bfloat16", HOPPER), 2 * 2 * 512 * 64 * 4),
        (MLP, 2 * 2 * 256 * 512),
        (dataclasses.replace(MLP, gated=True), 3 * 2 * 256 * 512),
    ],
)
def test_measuring_runs_here_too(monkeypatch, subject, touched):
    """The operands, the chain of calls, the comparison and the clock: all but the kernel itself."""
    module = sys.modules[type(subject).__module__]
    kernel = "sparse_mlp" if isinstance(subject, Mlp) else "sparse_decode_attention"
    oracle = (
        module.reference.reference if isinstance(subject, Mlp) else module.reference.sparse_decode_attention
    )

    def slow(x, *args, device, tiles, **options):
        return oracle(x, *args, **options).astype(x.dtype)

    monkeypatch.setattr(module.mosaic, kernel, slow)
    assert len(subject.operands[1]) == measure.sets_needed(touched)
    call = subject.run(None)
    first, last = call()
    assert first.shape == last.shape == subject.operands[0].shape
    assert abs(last.astype("float32")).max() < 50
    assert subject.right((first, last))
    assert not subject.right((first * 1.1, last))
    seconds, spread = measure.host_timer(lambda: first, repeats=2)
    assert seconds > 0
    assert spread >= 0


def test_selections_of_the_mlp_are_sorted_and_disjoint():
    one, two, *_ = (set(index.tolist()) for (index,) in MLP.operands[1])
    assert len(one) == len(two) == 256
    assert not one & two
    assert all(bool((index[1:] > index[:-1]).all()) for (index,) in MLP.operands[1])


# ---- files


@pytest.fixture
def chosen_from(monkeypatch):
    def read(path):
        monkeypatch.setenv(tuned.VARIABLE, str(path))
        tuned._known.cache_clear()

    yield read
    monkeypatch.undo()
    tuned._known.cache_clear()


def test_written_tiles_apply_to_their_call_only(tmp_path, chosen_from):
    path = tmp_path / "tuned.json"
    tuned.write(path, [dataclasses.replace(ENTRY, time_us=20.0)])
    tuned.write(path, [ENTRY, dataclasses.replace(ENTRY, dtype="float16")])
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # for others to read, too
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
def test_impossible_attention_tiles_in_a_file_are_an_error(tmp_path, chosen_from, tiles, match):
    path = tmp_path / "tuned.json"
    tuned.write(path, [dataclasses.replace(ENTRY, tiles=tiles)])
    chosen_from(path)
    with pytest.raises(ValueError, match=match):
        choose(PROBLEM, "bfloat16", HOPPER)


def mlp_entry(**tiles):
    best = mlp_tiles.Tiles(
        batch=16, groups=1, cols=128, stages=4, x_cols=64, x_slots=4, blocks=100, fused=False
    )
    return tuned.Entry(
        op="sparse_mlp",
        device=HOPPER.kind,
        dtype="bfloat16",
        shapes=MLP.shapes,
        tiles=choice.stored(best) | tiles,
        time_us=10.0,
        jax="1",
        commit="c",
    )


def test_the_mlp_takes_what_was_written(tmp_path, chosen_from, monkeypatch):
    path = tmp_path / "tuned.json"
    tuned.write(path, [mlp_entry()])
    chosen_from(path)
    call = {"selected": 256, "dtype": "bfloat16"}
    found = choice.measured(1, 512, HOPPER, **call)
    assert (found.blocks, found.stages, found.fused, found.copy) == (100, 4, False, "bulk")
    assert choice.measured(16, 512, HOPPER, **call) == found
    for batch, gated, dtype in ((17, False, "bfloat16"), (1, True, "bfloat16"), (1, False, "float16")):
        assert choice.measured(batch, 512, HOPPER, selected=256, gated=gated, dtype=dtype) is None
    taken = []
    monkeypatch.setattr(_device, "current", lambda *arrays: HOPPER)
    monkeypatch.setattr(mosaic, "sparse_mlp", lambda x, tiles, **call: taken.append(tiles) or x)
    weight = jnp.zeros((600, 512), jnp.bfloat16)
    for batch in (5, 17):
        jax.eval_shape(sparse_mlp, weight[:batch], weight, weight, jnp.zeros((256,), jnp.int32))
    assert set(taken) == {found, None}


@pytest.mark.parametrize(
    ("tiles", "match"),
    [
        ({"depth": 2}, "not a configuration"),
        ({"kernels": 3}, "not a configuration"),
        ({"cols": 96}, "cols must be a multiple"),
        ({"batch": 32}, "does not fit the call.* expected batch 16"),
        ({"blocks": 133}, "does not fit the call.* at most 132 blocks"),
        ({"stages": 40}, "too much shared memory"),
    ],
)
def test_impossible_mlp_tiles_in_a_file_are_an_error(tmp_path, chosen_from, tiles, match):
    path = tmp_path / "tuned.json"
    tuned.write(path, [mlp_entry(**tiles)])
    chosen_from(path)
    with pytest.raises(ValueError, match=f"^sparse_mlp tiles: .*{match}"):
        choice.measured(5, 512, HOPPER, selected=256, dtype="bfloat16")


GOOD = dataclasses.asdict(ENTRY)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "can't be read"),
        ("[]", "another format"),
        (json.dumps({"format": 2, "entries": []}), "another format"),
        (json.dumps({"format": 1, "entries": {}}), "no list of entries"),
        (json.dumps({"format": 1, "entries": [{"op": OP}]}), "entry 0: wrong names"),
        (json.dumps({"format": 1, "entries": [GOOD, GOOD]}), "entry 1: repeats"),
        (json.dumps({"format": 1, "entries": [GOOD | {"time_us": 0}]}), "entry 0: time_us"),
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
    problem = problem_of(AttentionCase(MODELS["opt-66b"], 64, 1920, 0.3))
    assert heuristic(problem, HOPPER).block == 64
    assert choose(problem, "bfloat16", HOPPER) == Tiles(block=128, stages=2, splits=1)
    assert choose(problem, "float16", HOPPER) == heuristic(problem, HOPPER)


# ---- the command

SIZES = "--batch 2 --groups 4 --queries 1 --width 64 --capacity 512 --selected 2".split()
MLP_SIZES = "--batch 5 --d-model 512 --neurons 600 --selected 256".split()
BOTH = pytest.mark.parametrize(("op", "sizes"), [(OP, SIZES), ("sparse_mlp", MLP_SIZES)])


@BOTH
def test_without_a_gpu_one_line_says_so(tmp_path, capsys, op, sizes):
    path = tmp_path / "tuned.json"
    assert command.main([op, *sizes, "--output", str(path)]) == 1
    assert capsys.readouterr().err == "autotune: needs an NVIDIA Hopper GPU; got cpu\n"
    assert not path.exists()


@BOTH
def test_command_writes_a_file(tmp_path, monkeypatch, op, sizes):
    path = tmp_path / "tuned.json"
    entry = ENTRY if op == OP else mlp_entry()
    monkeypatch.setattr(command._device, "current", lambda: HOPPER)
    monkeypatch.setattr(command, "tune", lambda subject: entry if subject.shapes == entry.shapes else None)
    assert command.main([op, *sizes, "--output", str(path)]) == 0
    assert tuned.load(path) == (entry,)


def test_foreign_output_file_is_refused_first(tmp_path, capsys, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text("something else")
    monkeypatch.setattr(command._device, "current", lambda: HOPPER)
    monkeypatch.setattr(command, "tune", lambda subject: pytest.fail("measured"))
    assert command.main([OP, *SIZES, "--output", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't be read" in line
    assert path.read_text() == "something else"


@pytest.mark.parametrize(
    ("op", "sizes", "match"),
    [
        (OP, [*SIZES, "--width", "40"], "multiple of 16"),
        (OP, [*SIZES, "--batch", "0"], "must be positive"),
        (OP, [*SIZES, "--selected", "0"], "must be positive"),
        (OP, [*SIZES, "--selected", "5"], "at most groups"),
        ("sparse_mlp", [*MLP_SIZES, "--batch", "129"], "at most 128"),
        ("sparse_mlp", [*MLP_SIZES, "--selected", "0"], "must be positive"),
        ("sparse_mlp", [*MLP_SIZES, "--selected", "601"], "at most neurons"),
        ("sparse_mlp", [*MLP_SIZES, "--d-model", "500"], "multiple of 128"),
    ],
)
def test_command_refuses_what_the_kernel_can_not_do(tmp_path, capsys, monkeypatch, op, sizes, match):
    monkeypatch.setattr(command._device, "current", lambda: HOPPER)
    assert command.main([op, *sizes, "--output", str(tmp_path / "x.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line


def test_help(capsys):
    run = [sys.executable, "-m", "pallas_kernels.autotune", "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "sparse_mlp" in done.stdout
    for op, told in (("sparse_mlp", "--d-model"), (OP, "--capacity")):
        with pytest.raises(SystemExit) as exit_:
            command.main([op, "--help"])
        assert exit_.value.code == 0
        assert told in capsys.readouterr().out
