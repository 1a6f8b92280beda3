"""Threads that submit, cancel, iterate and close at once, and parts that do not belong together: nothing is lost."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import polarjax as pj
from tests.engine.test_engine import MODEL, PIECES, PROMPTS, SETTINGS, SIZES, alone, bundle
from tests.model import zoo
from tests.one_line import refuses


def make() -> pj.Engine:
    return pj.Engine(bundle("dense"), **PIECES)  # few shapes to compile


@pytest.mark.parametrize("readers", [1, 3])
def test_fault_30_threads_submit_and_cancel_while_others_iterate(readers):
    """Submissions race with the end of the iteration; each event goes to one reader, and cancelled requests end."""
    engine = make()
    numbers, cancelled, events, done = {}, set(), [], threading.Event()

    def submit(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for _ in range(8):
            i = int(rng.integers(len(PROMPTS)))
            number = engine.submit(PROMPTS[i], **SETTINGS[i])
            assert numbers.setdefault(number, i) == i
            if rng.random() < 0.3 and engine.cancel(number):
                cancelled.add(number)

    def read() -> None:
        while not done.is_set() or engine.waiting or engine.in_use:
            events.extend(engine)

    with ThreadPoolExecutor(4 + readers) as pool:
        reading = [pool.submit(read) for _ in range(readers)]
        for each in [pool.submit(submit, i) for i in range(4)]:
            each.result()
        done.set()
        for each in reading:
            each.result()
    events.extend(engine)
    ends = {event.request: event.finished for event in events if event.finished}
    assert set(ends) == set(numbers) and len(numbers) == 32
    assert sum(event.finished is not None for event in events) == 32, "each ends once"
    if readers == 1:  # several don't know the order of their events among each other
        for number, i in numbers.items():
            tokens = [token for event in events if event.request == number for token in event.tokens]
            assert tokens == alone("dense")[i][: len(tokens)]
            assert ends[number] == "cancelled" or tokens == alone("dense")[i]
            assert number in cancelled or ends[number] != "cancelled"
    assert (engine.waiting, engine.in_use) == (0, 0)


def test_fault_30_an_engine_is_closed_while_threads_use_it():
    """Whoever iterates comes to an end, and whoever submits is refused in one line."""
    engine = make()
    refused = []

    def submit() -> None:
        try:
            while True:
                engine.submit(PROMPTS[0], max_new_tokens=12)
        except pj.InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=submit) for _ in range(2)]
    threads.append(threading.Thread(target=lambda: [list(engine) for _ in range(3)]))
    engine.submit(PROMPTS[0], max_new_tokens=12)
    next(engine)
    for each in threads:
        each.start()
    engine.close()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
    assert len(refused) == 2 and all("the engine is closed" in line for line in refused)
    assert list(engine) == [] and (engine.waiting, engine.in_use) == (0, 0)
    engine.close()


def test_requests_that_wait_leave_at_once_when_cancelled():
    engine = make()
    *running, _, _, _, _ = numbers = [engine.submit(PROMPTS[0], max_new_tokens=20) for _ in range(7)]
    next(engine)
    assert (engine.in_use, engine.waiting) == (3, 4)
    for each in numbers[3:]:
        engine.cancel(each)
    events = [next(engine)]
    assert (engine.in_use, engine.waiting) == (3, 0)
    ends = {event.request: event.finished for event in [*events, *engine] if event.finished}
    assert ends == {each: "length" if each in running else "cancelled" for each in numbers}
    assert engine.in_use == 0


def test_warming_up_loses_no_tokens():
    """It is refused while requests have slots, and does nothing to those that wait."""
    engine = make()
    number = engine.submit(PROMPTS[0], **SETTINGS[0])
    engine.warm_up()
    events = [next(engine)]
    with refuses(pj.InputError, "requests are running; got 1 slots in use"):
        engine.warm_up()
    events += engine
    assert sum((each.tokens for each in events if each.request == number), ()) == tuple(alone("dense")[0])
    engine.warm_up()


def test_fault_30_a_warm_up_that_failed_closes_the_engine(monkeypatch):
    engine = make()
    lost = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("RESOURCE_EXHAUSTED"))
    monkeypatch.setattr("polarjax.engine.programs.compile_all", lost)
    with refuses(pj.InputError, "ran out of memory.*slots; try 1"):
        engine.warm_up()
    with refuses(pj.InputError, "closed"):
        engine.submit([1])
    assert list(engine) == []


def test_fault_24_routers_of_other_weights_are_refused():
    other = zoo.with_rows(MODEL, "embed.tokens", 0, 0.5)
    with refuses(pj.SparsityError, "weights"):
        pj.Engine(dataclasses.replace(bundle("groups"), model=other), **SIZES)
    engine = pj.Engine(dataclasses.replace(bundle("groups"), model=other), **SIZES, dense=True)
    assert engine.in_use == 0
