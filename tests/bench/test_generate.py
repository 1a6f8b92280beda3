"""The trace is what it says, and the shares of a run are computed right; numbers themselves need a GPU."""

import jax
import numpy as np
import pytest

import polarjax as pj
from bench import bench_generate, engine_runs, report, static_batches, trace
from bench.engine_runs import Call, WatchedEngine
from bench.models import SHAPES, TINY_SHAPE
from polarjax.generation.token_loop import CHUNK
from tests.engine.test_engine import SIZES, bundle
from tests.model import zoo

NAME = "llama-gqa"
WISHES = [trace.Wish(np.arange(n, dtype=np.int32) % zoo.VOCAB, new) for n, new in ((9, 12), (3, 20), (14, 9))]


def test_the_trace_is_the_published_one():
    whole = trace.make_trace(32000)
    lengths, new = (
        np.array([len(wish.prompt) for wish in whole]),
        np.array([wish.new for wish in whole]),
    )
    assert len(whole) == 1024
    assert 32 <= lengths.min() < 40 and 1900 < lengths.max() <= 2048
    logs = np.sort(np.log(lengths))
    uniform = np.linspace(np.log(32), np.log(2048), len(logs))
    assert np.abs(logs - uniform).max() < 0.15
    assert new.min() >= 1 and new.max() == 1024
    assert np.mean(new) == pytest.approx(256 * (1 - (1 - 1 / 256) ** 1024), rel=0.05)
    assert np.mean(new <= 177) == pytest.approx(0.5, abs=0.05)  # the median of this geometric distribution
    assert max(wish.prompt.max() for wish in whole) < 32000


def test_a_shorter_trace_is_the_beginning_of_the_whole_one():
    whole, part = trace.make_trace(500), trace.make_trace(500, requests=7)
    assert [(each.prompt.tolist(), each.new) for each in part] == [
        (each.prompt.tolist(), each.new) for each in whole[:7]
    ]
    with pytest.raises(ValueError, match="1 to 1024"):
        trace.make_trace(500, requests=1025)


@pytest.mark.parametrize("shape", [*SHAPES.values(), TINY_SHAPE], ids=lambda shape: shape.name)
def test_the_trace_fits_every_model(shape):
    scale = bench_generate.scale_of(shape.config)
    fitted = trace.make_trace(shape.config.vocab_size, scale=scale)
    longest, most = trace.most(fitted)
    assert longest + most <= min(shape.config.max_positions, trace.capacity(scale))
    assert shape.plans().for_batch(64, shape.config) == shape.plan(64, neurons=True)


def test_shares_of_slots():
    """Two chunks of four slots while requests waited, and one after."""
    call = lambda waiting, taken, counts: Call([], waiting, taken, np.array(counts), lambda: None)
    read = Call(None, True, 1, np.array([1, 0, 0, 0]), lambda: None)
    calls = [
        read,
        call(True, 4, [CHUNK, CHUNK, 0, 0]),
        call(True, 3, [CHUNK, CHUNK // 2, 0, 0]),
        call(False, 1, [1, 0, 0, 0]),
    ]
    assert engine_runs.shares(calls, 4) == {"rows_in_use_pct": 100 * 3.5 / 8, "slots_taken_pct": 100 * 7 / 8}
    assert engine_runs.shares([read], 4) == {"rows_in_use_pct": None, "slots_taken_pct": None}


def test_a_request_without_all_its_tokens_gives_no_speed():
    right = bench_generate.rates(WISHES, [12, 20, 9], 2.0, 0)
    assert right["tokens_per_s"] == 41 / 2 and right["prompt_tokens_per_s"] == 26 / 2
    for tokens, failed in (([12, 19, 9], 0), ([12, 20, 9], 1)):
        row = bench_generate.rates(WISHES, tokens, 2.0, failed)
        assert "wrong" in row and "tokens_per_s" not in row


def test_seconds_alone_stand_for_all_calls(monkeypatch):
    calls = [Call([i], True, 1, None, lambda: None) for i in range(100)]
    monkeypatch.setattr(WatchedEngine, "seconds_of", lambda self, call: call.lengths[0] * 1.0)
    engine = WatchedEngine.__new__(WatchedEngine)
    assert engine_runs.seconds_alone(engine, calls) == pytest.approx(sum(range(100)), rel=0.1)
    assert engine_runs.seconds_alone(engine, []) == 0


def test_a_watched_engine_sees_every_token():
    wishes = [*WISHES, trace.Wish(np.arange(5, dtype=np.int32), 7)]
    with WatchedEngine(bundle("dense"), **SIZES) as engine:  # whose programs tests of the engine share
        done = engine_runs.run(engine, wishes)
        assert done.tokens == [wish.new for wish in wishes] and done.endings == {"length": 4}
        assert sum(int(np.sum(call.counts)) for call in done.calls) == sum(done.tokens)
        chunks = [call for call in done.calls if call.lengths is not None]
        assert chunks[0].lengths == [9, 3], "what the first call read"
        assert all(call.taken <= 3 for call in done.calls) and chunks[0].waiting and not chunks[-1].waiting
        columns = engine_runs.measured(engine, done)
        assert columns["chunks"] + columns["reads"] == len(done.calls)
        assert engine_runs.first_token(engine, zoo.VOCAB, 9, repeats=1) > 0
        again = engine_runs.run(engine, wishes)
    assert again.tokens == done.tokens, "slots that were measured still ran"


def test_static_batches_make_the_same_tokens():
    made = static_batches.run(pj.Bundle(zoo.model(NAME)), WISHES, 2, dense=True)
    assert made.tokens == [wish.new for wish in WISHES] and made.failed == 0
    assert made.steps == 2 * 24 + CHUNK  # 19 and 8 steps after the first token, in chunks


def test_whether_programs_were_kept(tmp_path):
    folder = tmp_path / "programs"
    before = jax.config.jax_compilation_cache_dir
    try:
        for value, state in ((None, "off"), (str(folder), "empty")):
            jax.config.update("jax_compilation_cache_dir", value)
            assert report.cache_state() == state
        folder.mkdir()
        folder.joinpath("program").touch()
        assert report.cache_state() == "filled"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
