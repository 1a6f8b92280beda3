"""Results in the order of the tasks, in memory that doesn't grow with their number."""

import gc
import itertools
import tracemalloc
from collections import deque

import numpy as np
import pytest

from polarjax.engine import in_order
from polarjax.engine.in_order import InOrder, Task
from polarjax.engine.requests import Event
from polarjax.errors import InputError
from polarjax.generation.logprobs import LogProbs


class FakeEngine:
    """Draws a token for each running request at a time; counts the requests that it holds."""

    def __init__(self, slots: int) -> None:
        self.slots, self.most, self._ids = slots, 0, itertools.count()
        self._waiting, self._running, self._events, self.resets = deque(), {}, deque(), []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def reset(self) -> None:
        assert not self._waiting and not self._running
        self.resets.append(next(self._ids))

    def submit(self, *, tokens: int, seed: int, logprobs: bool = False) -> int:
        if tokens < 0:
            raise InputError("nothing to generate", hint="ask for more")
        number = next(self._ids)
        self._waiting.append((number, tokens, logprobs))
        self.most = max(self.most, len(self._waiting) + len(self._running))
        return number

    def __next__(self) -> Event:
        while not self._events:
            while self._waiting and len(self._running) < self.slots:
                number, tokens, logprobs = self._waiting.popleft()
                self._running[number] = tokens, logprobs
            if not self._running:
                raise StopIteration
            for number, (left, logprobs) in list(self._running.items()):
                best = np.zeros((1, 2), np.float32)
                given = LogProbs(best[:, 0], best.astype(np.int32), best) if logprobs else None
                finished = "length" if left <= 1 else None
                self._events.append(Event(number, (left,), str(left), finished, given))
                self._running[number] = left - 1, logprobs
                if finished:
                    del self._running[number]
        return self._events.popleft()


def run(tokens, slots: int = 4, *, copies: int = 1, source_waits=lambda i: False, apart=None, **options):
    """Yields the number of each task and its answers as they come."""
    engine, given, asked = FakeEngine(slots), enumerate(tokens), []

    def take(wait: bool) -> Task | None:
        asked.append(wait)
        if not wait and source_waits(len(asked)):
            return None
        i, count = next(given, (None, 0))
        if i is None:
            return None
        if count is None:
            return Task(i, error=InputError("bad", hint="none"))
        return Task(i, {"tokens": count} | options, iter(range(copies)))

    runner = InOrder(engine, take, lambda event: None, apart)
    for task in runner:
        yield engine, runner, task


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("waits", [lambda i: False, lambda i: i % 3])
def test_results_come_in_order(copies, waits):
    """Whatever their lengths, with bad ones between, with a source that makes one wait."""
    tokens = [50, 1, None, 2, -1, 7, 1, None, None, 3, -1] * 3
    found = list(run(tokens, copies=copies, source_waits=waits))
    assert [task.source for *_, task in found] == list(range(len(tokens)))
    for *_, task in found:
        count = tokens[task.source]
        if count is None or count < 0:
            assert task.error is not None and not task.answers
            continue
        texts = ["".join(str(i) for i in range(count, 0, -1))] * copies
        assert [each.text for each in task.answers] == texts
        assert [each.tokens.tolist() for each in task.answers] == [list(range(count, 0, -1))] * copies
    assert found[-1][1].finished == len(tokens)


def test_nothing_gives_nothing():
    assert list(run([])) == []


def test_memory_does_not_grow_with_the_number_of_tasks():
    """Few requests are in the engine, and while the first task takes very long, a bounded number of others is begun."""
    peaks = []
    for count in (400, 2000):
        gc.collect()
        tracemalloc.start()
        taken = 0

        def tokens(count=count):
            nonlocal taken
            for i in range(count):
                taken += 1
                yield 3000 if i == 0 else 2

        for done, (engine, _, task) in enumerate(run(tokens())):
            assert task.source == done
            assert engine.most <= 2 * engine.slots
            assert taken - done <= in_order.most_held(engine.slots) + 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 50_000


def test_results_that_wait_are_limited_by_their_size(monkeypatch):
    monkeypatch.setattr(in_order, "HELD_BYTES", 2000)
    ahead = []
    for _, runner, task in run([300] + [20] * 200, copies=2, logprobs=True):
        ahead.append(runner.finished - task.source)
    assert max(ahead) < 10
    assert len(ahead) == 201


def test_tasks_apart_do_not_run_together():
    """Every five begin on an engine that has nothing else to do, and forgets what came before."""
    found = list(run([9, 1, None, 3, 1, 50, 1, 2, None, None, 4], copies=2, apart=5))
    assert [task.source for *_, task in found] == list(range(11))
    engine = found[0][0]
    assert len(engine.resets) >= 3


def test_an_engine_that_ends_early_is_no_end_of_the_tasks(monkeypatch):
    monkeypatch.setattr(FakeEngine, "__next__", lambda self: next(iter(())))
    with pytest.raises(RuntimeError, match="ended before its requests"):
        list(run([1]))
