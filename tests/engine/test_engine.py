"""The engine: every request gets what it gets alone, whatever runs beside it, and one request's end is its own."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.engine import programs
from polarjax.engine.sizes import plan_sizes, slots_and_capacity
from tests.model import zoo
from tests.model.test_traces import compilations
from tests.one_line import refuses
from tests.serving import server
from tests.tolerances import assert_close

NAME = "llama-gqa"
MODEL = jax.device_put(zoo.model(NAME), jax.devices()[0])  # bound to its device, as one that was loaded is
CONFIG = MODEL.config
SIZES = {"slots": 3, "capacity": 40, "read_tokens": 80}  # every prompt whole, in few shapes
PIECES = SIZES | {"read_tokens": 4}
RANDOM = np.random.default_rng(7)
PROMPTS = [RANDOM.integers(0, zoo.VOCAB, n).astype(np.int32) for n in (9, 1, 14, 3, 16, 6, 11)]
SETTINGS = [  # of one bucket, as the prompts are: `generate` compiles two programs for all
    {"max_new_tokens": 12},
    {"max_new_tokens": 16, "sampler": pj.Categorical(1.3, top_k=20), "seed": 5},
    {"max_new_tokens": 3, "sampler": pj.Categorical(0.9, top_p=0.8), "seed": -(2**40)},
    {"max_new_tokens": 16, "repetition_penalty": 1.7},
    {"max_new_tokens": 9, "sampler": pj.Categorical(2.0), "repetition_penalty": 1.2, "stop_ids": (3, 4, 5, 6)},
    {"max_new_tokens": 1},
    {"max_new_tokens": 12, "sampler": pj.Categorical(1.1), "seed": 2**40},
]  # fmt: skip
TABLE = pj.PlanTable(
    num_layers=CONFIG.num_layers,
    num_neurons=CONFIG.d_ff,
    num_groups=CONFIG.num_kv_heads,
    batch_sizes=(1,),
    neurons=((None, None),),
    recall=((1.0, 1.0),),
)


MARKED = np.arange(1, 21)  # without 0, which is what rows that have ended draw
STRICT = {
    "max_new_tokens": 15,
    "repetition_penalty": 1e6,
}  # no id twice: each that is taken for its own shows


@functools.cache
def unmarked() -> tuple[int, ...]:
    """What follows `MARKED` if nothing else is taken for its ids."""
    (expected,) = pj.generate(MODEL, MARKED[None], np.array([len(MARKED)]), **STRICT).tokens.tolist()
    assert 0 in expected
    return tuple(expected)


def test_a_prompt_in_pieces_sees_only_its_own_ids():
    """Steps of other rows, between its pieces, leave no mark on a row that is being read."""
    engine = pj.Engine(bundle("dense"), **PIECES)
    engine.submit(PROMPTS[1], max_new_tokens=20)
    number = engine.submit(MARKED, **STRICT)
    assert sum((each.tokens for each in engine if each.request == number), ()) == unmarked()


@functools.cache
def bundle(kind: str) -> pj.Bundle:
    """The tiny model, alone or with routers and a plan of its groups."""
    return pj.Bundle(MODEL) if kind == "dense" else pj.Bundle(MODEL, None, zoo.routers(NAME), TABLE)


@functools.cache
def alone(kind: str) -> dict[int, list[int]]:
    """What `generate` makes of each request; with a plan, of two: the engine draws in the same way with and without."""
    sparsity = None if kind == "dense" else bundle(kind).sparsity(1)
    made = {}
    for i in range(len(PROMPTS)) if kind == "dense" else (1, 3):
        prompt, rest = PROMPTS[i], dict(SETTINGS[i])
        key = jax.random.key(rest.pop("seed", 0))
        done = pj.generate(MODEL, prompt[None], np.array([len(prompt)]), key, sparsity=sparsity, **rest)
        made[i] = np.asarray(done.tokens)[0, : int(done.lengths[0])].tolist()
    return made


def run(engine: pj.Engine, order, later=(), **more) -> dict[int, tuple[list[int], str | None]]:
    """Tokens and ending of the requests in `order`, and of those submitted `later`, one after every other event."""
    waiting, numbers, found = list(later), {}, {}
    submit = lambda i: numbers.update({engine.submit(PROMPTS[i], **SETTINGS[i] | more): i})
    for i in order:
        submit(i)
    for count, event in enumerate(engine):
        tokens, ended = found.get(numbers[event.request], ([], None))
        assert ended is None, "nothing comes after the end"
        found[numbers[event.request]] = [*tokens, *event.tokens], event.finished
        if waiting and count % 2:
            submit(waiting.pop(0))
    assert not waiting
    return found


@pytest.mark.parametrize("kind", ["dense", "groups"])
@pytest.mark.parametrize("sizes", [PIECES, SIZES], ids=["pieces", "whole"])
def test_a_request_gets_what_it_gets_alone(kind, sizes):
    """In any slot, company and order of arrival, with prompts read whole, in pieces and several at a time."""
    expected = alone(kind)
    assert kind != "dense" or (expected[4][-1] in (3, 4, 5, 6) and len(expected[4]) < 9)
    engine = pj.Engine(bundle(kind), **sizes)
    everything = range(len(PROMPTS))
    for order, later in ((everything, ()), (reversed(everything), ()), ((4, 2), (0, 1, 6, 5, 3))):
        found = run(engine, order, later)
        for i, tokens in expected.items():
            assert found[i] == (tokens, "stop" if i == 4 else "length")


def test_draws_do_not_depend_on_the_kind_of_keys():
    """Under `jax.vmap`, keys of the kind rbg draw what the first of them draws."""
    expected = {i: alone("dense")[i] for i in (1, 6)}
    with jax.default_prng_impl("rbg"):
        found = run(pj.Engine(bundle("dense"), **PIECES), (6, 1))
    assert {i: tokens for i, (tokens, _) in found.items()} == expected


def test_no_request_compiles_anything():
    """After `warm_up`: whatever the lengths, settings, number of rows, and order."""
    with pj.Engine(bundle("groups"), **SIZES) as engine:
        engine.warm_up()
        with compilations() as names, jax.transfer_guard("disallow"):
            run(engine, range(len(PROMPTS)))
            run(engine, (3,), (0, 4), logprobs=3)
    assert names == []


def test_the_cache_is_written_in_place():
    engine = pj.Engine(bundle("dense"), **SIZES)
    places = lambda: {leaf.unsafe_buffer_pointer() for leaf in engine._slots.state.cache.k}
    before = places()
    run(engine, (0, 2, 3))
    assert places() == before


def test_fault_19_nan_in_one_row_ends_it_alone():
    met = {*np.concatenate(PROMPTS).tolist(), *alone("dense")[0], *alone("dense")[3]}
    stranger = min(set(range(zoo.VOCAB)) - met)
    broken = pj.Bundle(
        jax.device_put(zoo.with_rows(MODEL, "embed.tokens", stranger, np.nan), jax.devices()[0])
    )
    engine = pj.Engine(broken, **SIZES)
    bad = engine.submit([1, stranger, 2], max_new_tokens=5)
    good = [engine.submit(PROMPTS[i], **SETTINGS[i]) for i in (0, 3)]
    events = list(engine)
    assert [(e.tokens, e.finished) for e in events if e.request == bad] == [((), "failed")]
    for number, i in zip(good, (0, 3), strict=True):
        mine = [event for event in events if event.request == number]
        assert sum((event.tokens for event in mine), ()) == tuple(alone("dense")[i])
    start = RANDOM.choice(sorted({*range(zoo.VOCAB)} - {stranger}), 35)
    engine.submit(np.append(start, stranger), max_new_tokens=1)
    assert [event.finished for event in engine] == ["failed"]
    engine.submit(np.append(start, start[0]), max_new_tokens=1)
    assert [event.finished for event in engine] == ["length"], "it shares nothing with one that failed"


def test_cancelled_requests_free_their_slots():
    """While waiting, being read and running; the others, and those that take their slots, are as ever."""
    engine = pj.Engine(bundle("dense"), **PIECES)
    company = [engine.submit(PROMPTS[1], max_new_tokens=39) for _ in range(2)]  # leave one slot
    running = engine.submit(PROMPTS[3], max_new_tokens=30)
    waiting = engine.submit(PROMPTS[0], max_new_tokens=30)
    kept = engine.submit(MARKED, **STRICT)  # read in the slot of the first one, which must not go on
    events = []
    while running not in [event.request for event in events]:
        events.append(next(engine))
    assert {event.request for event in events} <= {running, *company}
    assert (engine.in_use, engine.waiting) == (3, 2)
    assert engine.cancel(running) and engine.cancel(waiting)
    events = list(engine)
    assert [(e.request, e.tokens) for e in events if e.finished == "cancelled"] == [
        (running, ()),
        (waiting, ()),
    ]
    assert sum((e.tokens for e in events if e.request == kept), ()) == unmarked()
    assert not engine.cancel(running) and not engine.cancel(99)
    long = engine.submit(PROMPTS[4], max_new_tokens=20)
    engine._turn()  # reads four of its tokens
    engine.cancel(long)
    again = [engine.submit(PROMPTS[0], **SETTINGS[0]) for _ in range(3)]  # one gets its slot
    events = list(engine)
    assert [e.finished for e in events if e.request == long] == ["cancelled"]
    for each in again:
        assert sum((e.tokens for e in events if e.request == each), ()) == tuple(alone("dense")[0])


def test_running_rows_wait_for_one_call_at_a_time(monkeypatch):
    """A long prompt is read a chunk at a time between steps; results are looked at once the next call is sent."""
    calls, handle = [], pj.Engine._handle
    for name in ("read", "decode"):
        program = getattr(programs, name)
        spy = lambda *a, name=name, program=program, **k: calls.append(name) or program(*a, **k)
        monkeypatch.setattr(programs, name, spy)
    monkeypatch.setattr(pj.Engine, "_handle", lambda self, *a: calls.append("handle") or handle(self, *a))
    engine = pj.Engine(bundle("dense"), **PIECES)
    engine.submit(PROMPTS[1], max_new_tokens=30)
    engine.submit(PROMPTS[4][:12], max_new_tokens=3)
    next(engine)
    list(engine)
    sent = "".join({"read": "r", "decode": "d", "handle": ""}[each] for each in calls)
    assert sent.startswith("rdrdrdrd"), "each part of the long prompt waits for a chunk of steps"
    waiting, last = 0, max(i for i, each in enumerate(calls) if each != "handle")
    for i, each in enumerate(calls):
        waiting += -1 if each == "handle" else 1
        assert 1 <= waiting <= 3 or i > last, "the device has a call to run while the host looks at one"


def test_prompts_that_begin_alike_are_read_once(monkeypatch):
    """From a slot that runs, one that ended, and the request's own; the tokens are those of the whole prompt."""
    copied, share = [], programs.share
    spy = lambda slots, *numbers, layout: (
        copied.append(tuple(int(each) for each in numbers if not each.ndim))
        or share(slots, *numbers, layout=layout)
    )
    monkeypatch.setattr(programs, "share", spy)
    start = np.random.default_rng(3).integers(1, zoo.VOCAB, 35).astype(np.int32)
    prompts = [
        np.append(start, [7, 8]),
        np.append(start[:33], [1]),
        start,
        start[:32],
        np.append(start, [7, 8]),
    ]
    settings = {"max_new_tokens": 3, "repetition_penalty": 1.5}
    engine = pj.Engine(bundle("dense"), **SIZES)
    engine.submit(PROMPTS[1], max_new_tokens=39)  # leaves two slots
    first = engine.submit(prompts[0], max_new_tokens=3)
    while engine.waiting or engine._reading:
        next(engine)
    numbers = [engine.submit(each, **settings) for each in prompts[1:]]
    events = list(engine)
    for number, prompt in zip(numbers, prompts[1:], strict=True):
        expected = pj.generate(MODEL, prompt[None], np.array([len(prompt)]), **settings).tokens[0].tolist()
        assert sum((each.tokens for each in events if each.request == number), ()) == tuple(expected)
    assert [count for *_, count in copied] == [33, 34, 35]
    assert copied[0][:2] == (1, 2)
    assert any(each.request == first and each.finished for each in events)
    engine.reset()
    engine.submit(prompts[0], max_new_tokens=3)
    next(engine)
    assert len(copied) == 3, "a reset engine holds nothing"
    with refuses(pj.InputError, "Engine.reset: requests are running; got 1 slots in use"):
        engine.reset()


def test_log_probabilities_are_those_of_forward():
    """Before penalties and temperature, here and in `generate` and `stream`."""
    settings = {
        "max_new_tokens": 12,
        "sampler": pj.Categorical(1.3),
        "repetition_penalty": 1.5,
        "logprobs": 3,
    }
    prompt, n = PROMPTS[6][:4], 4
    length, key = np.array([n]), jax.random.key(2)
    made = pj.generate(MODEL, prompt[None], length, key, **settings)
    row = np.concatenate([prompt, made.tokens[0]])[: zoo.WIDTH]
    logits = zoo.forward(MODEL, jnp.asarray([row] * 3), jnp.array([zoo.WIDTH] * 3))[0]
    expected = np.asarray(jax.nn.log_softmax(logits[0], -1))[n - 1 : -1]  # of the ten tokens that fit
    pieces = list(pj.stream(MODEL, prompt[None], length, key, **settings))
    engine = pj.Engine(bundle("dense"), **SIZES)
    engine.submit(prompt, seed=2, **settings)
    quiet = engine.submit(prompt, max_new_tokens=5)
    events = list(engine)
    assert all((event.logprobs is None) == (event.request == quiet) for event in events)
    mine = [event.logprobs for event in events if event.request != quiet]
    together = lambda parts: jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    streamed = together([jax.tree.map(lambda leaf: leaf[0], piece.logprobs) for piece in pieces])
    for got in (jax.tree.map(lambda leaf: leaf[0], made.logprobs), streamed, together(mine)):
        assert got.ids.shape == got.best.shape == (12, 3)
        assert_close(got.chosen[:10], expected[np.arange(10), row[n:]], "rounding")
        assert_close(got.best[:10], -np.sort(-expected, -1)[:, :3], "rounding")
        assert (np.asarray(got.ids)[:10] == np.argsort(-expected, -1)[:, :3]).all()


def test_the_plan_is_that_of_the_rows_in_use():
    assert [plan_sizes(n) for n in (1, 3, 48)] == [[1], [1, 3], [1, 3, 12, 48]]
    table = dataclasses.replace(
        TABLE, batch_sizes=(1, 2), neurons=((8, 8), (16, 16)), recall=((1.0, 1.0),) * 2
    )
    engine = pj.Engine(pj.Bundle(MODEL, None, zoo.routers(NAME), table), **SIZES, head_density=1.0)
    kept = {size: options["sparsity"].plan.neurons for size, options in engine._chunks.items()}
    assert kept == {1: (8, 8), 3: (None, None)}
    sparsity = engine._bundle.sparsity(1, 1.0)
    expected = pj.generate(MODEL, PROMPTS[0][None], np.array([9]), max_new_tokens=12, sparsity=sparsity)
    assert run(engine, (0,))[0][0] == expected.tokens[0].tolist(), (
        "alone, it is decoded by the plan for one row"
    )


def test_fault_30_a_closed_engine_frees_its_memory_and_refuses_work():
    gc.collect()
    before = {id(each) for each in jax.live_arrays()}
    held = lambda: [
        x for x in jax.live_arrays() if id(x) not in before and x.shape[:1] == (3,) and x.ndim == 4
    ]
    with pj.Engine(bundle("dense"), **SIZES) as engine:
        engine.submit(PROMPTS[0], max_new_tokens=20)
        next(engine)
        assert held()
    assert held() == []
    assert list(engine) == []
    with refuses(pj.InputError, "closed"):
        engine.submit([1], max_new_tokens=1)
    dropped = pj.Engine(bundle("dense"), **SIZES)
    dropped.submit(PROMPTS[0], max_new_tokens=20)
    next(dropped)
    del dropped
    gc.collect()
    assert held() == []


def test_fault_30_an_engine_whose_call_failed_is_closed(monkeypatch):
    engine = pj.Engine(bundle("dense"), **SIZES)
    engine.submit(PROMPTS[0], max_new_tokens=20)
    next(engine)
    monkeypatch.setattr(
        "polarjax.engine.programs.decode",
        lambda *a, **k: (_ for _ in ()).throw(RuntimeError("Out of memory")),
    )
    with refuses(pj.InputError, "3 sequences of up to 40.*ran out of memory.*slots; try 1"):
        list(engine)
    with refuses(pj.InputError, "closed"):
        engine.submit([1])


REFUSED = {
    "fault 22, no tokens": ({"prompt": []}, "not a prompt"),
    "two rows": ({"prompt": [[1], [2]]}, r"not a prompt; got int64\[2, 1\]"),
    "half a token": ({"prompt": [1.5]}, "not a prompt"),
    "not one": ({"prompt": None}, "not a prompt"),
    "fault 20, a negative id": ({"prompt": [1, -1]}, "token 1 is outside the vocabulary; got -1"),
    "fault 20, beyond int32": ({"prompt": [2**40]}, "outside the vocabulary"),
    "fault 20, outside the vocabulary": ({"prompt": [1, 61]}, "token 1 is outside the vocabulary; got 61"),
    "fault 21, a prompt beyond the slot": ({"prompt": [1] * 41}, "capacity; got 41 prompt tokens"),
    "fault 21, a prompt beyond the model": ({"prompt": [1] * 60}, "positions"),
    "fault 21, beyond the slot": (
        {"max_new_tokens": 33},
        "capacity; got 9 prompt tokens . 33 new ones, expected at most 40",
    ),
    "beyond the model": ({"max_new_tokens": 41}, "exceed the model's positions"),
    "fault 23, a penalty that is NaN": ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    "fault 23, no stop string": ({"stop_strings": ("",)}, "unusable stop strings"),
    "fault 23, one text as stop strings": ({"stop_strings": "ab"}, "unusable stop strings"),
    "nothing to make": ({"max_new_tokens": 0}, "max_new_tokens"),
    "a sampler of its own": ({"sampler": lambda logits, key: logits}, "can't draw with this sampler"),
    "a number per row": ({"sampler": pj.Categorical((1.0, 2.0))}, "can't draw with this sampler"),
    "no sampler": ({"sampler": 3}, "not a sampler"),
    "half a seed": ({"seed": 0.5}, "no such seed"),
    "a large seed": ({"seed": 2**63}, "no such seed"),
    "a negative id": ({"stop_ids": (-1,)}, "stop_ids"),
    "many ids": ({"stop_ids": range(17)}, "too many stop ids; got 17, expected at most 16"),
    "no penalty": ({"repetition_penalty": 0.0}, "repetition_penalty"),
    "many log-probabilities": ({"logprobs": 21}, "logprobs.*got 21, expected 0 to 20"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_requests_in_one_line(case):
    given, named = REFUSED[case]
    engine = shared_engine()
    with refuses(pj.InputError, named):
        engine.submit(**{"prompt": PROMPTS[0], "max_new_tokens": 4} | given)
    assert list(engine) == []


@functools.cache
def shared_engine() -> pj.Engine:
    """One engine for all that it refuses."""
    return pj.Engine(bundle("dense"), **SIZES)


@pytest.mark.parametrize("text", ["Hi", [{"role": "user", "content": "Hi"}]])
def test_text_needs_a_tokenizer(text):
    with refuses(pj.CheckpointError, "no tokenizer"):
        shared_engine().submit(text)
    with refuses(pj.CheckpointError, "stop_strings.*no tokenizer"):
        shared_engine().submit([1], stop_strings=["a"])


@pytest.mark.parametrize(
    ("given", "kind", "named"),
    [
        ({"slots": 0}, pj.InputError, "slots"),
        ({"capacity": 2.5}, pj.InputError, "capacity"),
        ({"read_tokens": 0}, pj.InputError, "read_tokens"),
        ({"dense": 1}, pj.InputError, "dense"),
        ({"dense": True, "head_density": 0.5}, pj.InputError, "contradict"),
        ({"head_density": 0.5}, pj.SparsityError, "no routers"),
        ({"bundle": bundle("groups"), "head_density": 0.0}, pj.SparsityError, "density"),
        ({"bundle": bundle("groups"), "head_density": float("nan")}, pj.SparsityError, "density"),
        ({"bundle": bundle("groups"), "head_density": 1.5}, pj.SparsityError, "density"),
        ({"implementation": "cuda"}, pj.InputError, "implementation"),
        ({"bundle": MODEL}, pj.InputError, "not a Bundle"),
    ],
)
def test_refuses_engines_in_one_line(given, kind, named):
    with refuses(kind, named):
        pj.Engine(**{"bundle": bundle("dense")} | given)


def test_sizes_follow_the_device_memory(monkeypatch):
    """Slots and capacity fill what the device says it has, and what doesn't fit is refused before it is made; on a CPU
    that is what the machine has."""
    for capacity in (None, 10**9):  # no sequence is longer than the model's positions
        assert slots_and_capacity(CONFIG, jnp.float32, None, capacity, read_tokens=64) == (8, 48)
    with refuses(pj.InputError, "the slots do not fit into the machine's memory"):
        slots_and_capacity(CONFIG, jnp.float32, 10**10, None, read_tokens=64)
    monkeypatch.setattr("polarjax.memory.held_bytes", lambda: pj.costs.weights_bytes(CONFIG, "float32"))
    monkeypatch.setattr("polarjax.memory.device_memory", lambda: 2_000_000)
    size = functools.partial(slots_and_capacity, CONFIG, jnp.float32, read_tokens=8)
    slots, capacity = size(None, None)
    assert capacity == 48 and 8 < slots < 256
    assert size(None, 24)[0] > slots
    assert size(2 * slots, None)[1] < 48
    with refuses(pj.InputError, f"do not fit.*expected at most {slots:,} of that"):
        size(slots + 1, 48)


def test_texts_are_those_of_complete():
    """Texts and conversations; stop strings within and across tokens; the model's own settings by default."""
    bundle = server.bundle()  # and the sizes of its engine: tests of the server share the programs
    settings = dataclasses.replace(bundle.tokenizer.generation, max_new_tokens=12)
    bundle = dataclasses.replace(bundle, tokenizer=dataclasses.replace(bundle.tokenizer, generation=settings))
    prompts = ["Once upon a time", [{"role": "user", "content": "Hi, ünï!"}], "A", "def f", "ünï"]
    free = bundle.complete(prompts)
    stops = [free[0].text[3:6], free[1].text[-4:], "</s>"]  # the last one is a special token
    with pj.Engine(bundle, **server.SIZES) as engine:
        for given in ({}, {"stop_strings": stops}, {"max_new_tokens": 5, "sampler": pj.Categorical(0.7)}):
            drawn = "sampler" in given  # a row of a batch draws with a number of its own
            numbers = [engine.submit(each, **given) for each in (prompts[:1] if drawn else prompts)]
            events = list(engine)
            together = [] if drawn else bundle.complete(prompts, **given)
            for i, number in enumerate(numbers):
                expected = bundle.complete([prompts[i]], **given)[0] if drawn else together[i]
                mine = [event for event in events if event.request == number]
                assert "".join(event.text for event in mine) == expected.text
                assert sum((event.tokens for event in mine), ()) == expected.tokens
                assert mine[-1].finished == ("length" if expected.ending == "length" else "stop")
            if "stop_strings" in given:
                assert [event.finished for event in events if event.request == numbers[0]][-1] == "stop"
