"""Decode attention: the oracle and both implementations against NumPy, and the kernel compiled for an H200."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.bench_decode_attention import problem_of
from bench.check_decode_attention import Check, poisoned
from bench.workloads import MODELS, AttentionCase, attention_cases
from pallas_kernels import _device, record_backends, sparse_decode_attention
from pallas_kernels._device import HOPPER
from pallas_kernels.decode_attention import mosaic, reference
from pallas_kernels.decode_attention.tiles import Problem, Tiles, choose, heuristic, search_space
from tests.covering import covering_pairs
from tests.kernels import aot
from tests.kernels.races import race_found
from tests.tolerances import assert_close

# two blocks of 64 and 8 positions more; lengths of nothing, one, a block -1 +0 +1, all, and more than there is
EDGES: dict[str, Any] = {"groups": 3, "capacity": 136, "lengths": (0, 1, 63, 64, 65, 128, 136, 150)}
DISTINCT = (
    (2, 0, -1),
    (0, 1, 2),
    (-1, -1, 1),
    (2, -1, 1),
    (-1, -1, -1),
    (1, 7, -5),
    (0, 2, 1),
    (-1, 2, -1),
)
REPEATED = ((2, 2, 2), (0, 1, 0), (-1, 1, 1), (2, -1, 2), (-1, -1, -1), (1, 1, 1), (0, 2, 0), (2, 2, -1))
SHORT: dict[str, Any] = {"groups": 2, "capacity": 72, "lengths": (72, 9), "index": ((1, -1), (0, 1))}
DENSE: dict[str, Any] = {"groups": 2, "capacity": 136, "index": None}


def call_of(check: Check, function, **options):
    return functools.partial(function, scale=check.width**-0.5, window=check.window, **options)


def asked(check: Check) -> np.ndarray:
    """[B K]: where the result may differ from zero."""
    named = np.ones((len(check.lengths), check.groups), bool)
    if check.index is not None:
        named = (np.asarray(check.index)[:, :, None] == np.arange(check.groups)[None, None, :]).any(1)
    return named & (np.asarray(check.lengths) > 0)[:, None]


def assert_right(check: Check, out: jax.Array) -> None:
    operands = poisoned(check)
    assert out.dtype == operands.q.dtype
    found = np.asarray(out, np.float32)
    assert_close(found, by_hand(check), "kernel", check.dtype)
    np.testing.assert_array_equal(found[~asked(check)], 0)


def by_hand(check: Check) -> np.ndarray:
    """One head after the other, in float64, from what may be read alone."""
    q, k, v = (np.asarray(x, np.float64) for x in list(vars(poisoned(check)).values())[:3])
    out = np.zeros(q.shape)
    for row, group in np.argwhere(asked(check)):
        end = min(check.lengths[row], check.capacity)
        seen = slice(0 if check.window is None else max(0, end - check.window), end)
        for query in range(check.queries):
            scores = k[row, group, seen] @ q[row, group, query] * check.width**-0.5
            weights = np.exp(scores - scores.max())
            out[row, group, query] = weights @ v[row, group, seen] / weights.sum()
    return out


def case_name(check: Check) -> str:
    tiles = f"{check.tiles.block}x{check.tiles.stages}s{check.tiles.splits}" if check.tiles else "heuristic"
    selection = {None: "dense", DISTINCT: "distinct", REPEATED: "repeated"}.get(check.index, "few")
    return f"{check.dtype}-{selection}-H{check.width}-G{check.queries}-w{check.window}-{tiles}"


# ---- the oracle and plain XLA


XLA_CHECKS = [
    Check(**EDGES, queries=3, width=32, dtype=dtype, index=index)
    for dtype in ("float32", "float16", "bfloat16")
    for index in (None, DISTINCT, REPEATED)
]
WINDOWED = [
    dataclasses.replace(check, window=window, lengths=(0, 1, 63, 64, 65, 128, 136, 135))
    for check in XLA_CHECKS[:3]
    for window in (1, 64, 500)
]


@pytest.mark.parametrize("check", [*XLA_CHECKS[:3], *WINDOWED], ids=case_name)
def test_oracle_is_softmax_over_what_may_be_read(check):
    out = call_of(check, reference.sparse_decode_attention)(*vars(poisoned(check)).values())
    assert_close(out, by_hand(check), "kernel", check.dtype)


@pytest.mark.parametrize("check", [*XLA_CHECKS, *WINDOWED], ids=case_name)
def test_xla(check):
    call = call_of(check, sparse_decode_attention, implementation="xla")
    assert_right(check, jax.jit(call)(*vars(poisoned(check)).values()))


@pytest.mark.parametrize("dtype", ["int8", "int64"])
def test_integers_of_any_width_and_numpy_arrays(dtype):
    """127 is the most that int8 holds; the cache is longer."""
    check = Check(groups=3, capacity=200, width=32, dtype="float32", lengths=(1, 127, 65), index=DISTINCT[:3])
    q, k, v, lengths, index = (np.asarray(x) for x in vars(poisoned(check)).values())
    out = call_of(check, sparse_decode_attention)(q, k, v, lengths.astype(dtype), index.astype(dtype))
    assert_right(check, out)


@pytest.mark.parametrize("index", [None, DISTINCT])
def test_vmap_of_xla(index):
    """A leading axis of two calls, the second with keys and values in another order of the sequences."""
    check = Check(**EDGES, queries=2, width=32, dtype="float32", index=index)
    call = call_of(check, sparse_decode_attention, implementation="xla")
    one = list(vars(poisoned(check)).values())
    two = [None if x is None else x[::-1] for x in one]
    both = jax.tree.map(lambda x, y: jnp.stack([x, y]), one, two)
    out = jax.vmap(call, in_axes=(0, 0, 0, 0, None if index is None else 0))(*both)
    assert_right(check, out[0])
    assert_right(check, out[1][::-1])


def test_scan_of_xla():
    """Lengths grow by one a step, as in decoding."""
    check = Check(**EDGES, queries=2, width=32, dtype="float32", index=DISTINCT)
    call = call_of(check, sparse_decode_attention, implementation="xla")
    q, k, v, lengths, index = vars(poisoned(dataclasses.replace(check, lengths=(130,) * 8))).values()
    k, v = (jnp.nan_to_num(x) for x in (k, v))
    _, outs = jax.lax.scan(lambda n, _: (n + 1, call(q, k, v, n, index)), lengths, length=3)
    assert_close(outs[2], call(q, k, v, lengths + 2, index), "kernel", "float32")


# ---- the Hopper kernel in the interpreter


ORDERED = dataclasses.replace(HOPPER, num_sms=1)
"""Too small for all thread blocks at once, so the longest sequences come first."""


def interpreted(check: Check) -> jax.Array:
    """The kernel's result on a CPU; races_found() then says whether two of its accesses were unordered."""
    interpreter.reset_gpu_interpret_mode_state()
    params = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")  # ignore: the fence
    call = call_of(check, mosaic.sparse_decode_attention, device=ORDERED, tiles=check.tiles, interpret=params)
    return jax.block_until_ready(call(*vars(poisoned(check)).values()))


def races_found() -> bool:
    return interpreter.get_races().races_found


@pytest.mark.parametrize(
    "check",
    [
        Check(**EDGES, queries=2, width=64, index=DISTINCT, tiles=Tiles(block=64, stages=2)),
        Check(**DENSE, lengths=(1, 64, 65, 150), width=64, tiles=Tiles(stages=1, splits=2), dtype="float16"),
        dataclasses.replace(WINDOWED[0], width=64, index=DISTINCT, window=37, dtype="bfloat16"),
        Check(**DENSE, lengths=(0, 65, 136), width=64, queries=3, window=1, tiles=Tiles(splits=4)),
        Check(
            groups=2,
            queries=4,
            capacity=264,
            lengths=(127, 129, 264),
            index=((0, 1), (1, -1), (-1, 0)),
            tiles=Tiles(block=128, stages=3, splits=2),
        ),
        Check(groups=2, capacity=72, lengths=(72,), index=((1,),), tiles=Tiles(stages=2, splits=8)),
        Check(**DENSE, lengths=(1, 65, 150), width=64, tiles=Tiles(stages=1, splits=3)),
        Check(**SHORT, queries=12, window=40),
        Check(**SHORT, width=32, queries=3, dtype="float16"),
        Check(**SHORT, width=80, queries=5, window=20),
        Check(**SHORT, width=96, dtype="float16"),
        Check(**SHORT, width=256, queries=2, tiles=Tiles(block=64, stages=2, splits=2)),
        Check(groups=1, capacity=72, lengths=(70,), index=None, queries=7),
        Check(
            groups=1,
            capacity=520,
            lengths=(0, 64, 65, 385, 300, 520),
            index=None,
            tiles=Tiles(block=256, stages=1),
        ),
    ],
    ids=case_name,
)
def test_kernel_interpreted(check):
    out = interpreted(check)
    assert not races_found()
    assert_right(check, out)


def test_kernel_interpreted_with_repeated_groups():
    """Both thread blocks of a repeated group write its rows: the same bytes, and the only race there is."""
    check = Check(**EDGES, queries=2, width=64, index=REPEATED, tiles=Tiles(block=64, stages=2))
    params = plgpu.InterpretGPUParams(detect_races=False)
    call = call_of(check, mosaic.sparse_decode_attention, device=HOPPER, tiles=check.tiles, interpret=params)
    assert_right(check, call(*vars(poisoned(check)).values()))


def test_longest_sequences_come_first():
    lengths = jnp.asarray((5, 0, 90, 7, 90, 64, -3))
    assert mosaic.longest_first(lengths, 136).tolist() == [2, 4, 5, 3, 0, 1, 6]
    of_a_window = mosaic.longest_first(lengths, 7)
    assert of_a_window.tolist() == [2, 3, 4, 5, 0, 1, 6]


def test_vmap_of_the_kernel_interpreted():
    check = Check(**SHORT, width=64, queries=2, tiles=Tiles(block=64, stages=2))
    params = plgpu.InterpretGPUParams(detect_races=False)
    call = call_of(check, mosaic.sparse_decode_attention, device=HOPPER, tiles=check.tiles, interpret=params)
    one = list(vars(poisoned(check)).values())
    out = jax.vmap(call)(*(jnp.stack([x, x[::-1]]) for x in one))
    assert_right(check, out[0])
    assert_right(check, out[1][::-1])


def test_race_detection_sees_two_writers():
    call: dict[str, Any] = SHORT | {"index": ((1, 1), (0, -1))}
    check = Check(**call, width=64, tiles=Tiles(block=64, stages=2))
    assert race_found(lambda: interpreted(check))


# ---- tiles


@pytest.mark.parametrize(
    ("model", "batch", "cache", "density", "expected"),
    [
        ("opt-6.7b", 16, 1920, 0.3, (64, 2, 1)),
        ("opt-6.7b", 16, 1920, 1.0, (128, 2, 1)),
        ("opt-66b", 64, 1920, 1.0, (128, 2, 1)),
        ("llama-3.1-8b", 64, 8192, 1.0, (128, 2, 1)),
        ("llama-3.1-8b", 16, 8192, 0.3, (128, 2, 2)),
        ("llama-3.1-8b", 16, 8192, 0.625, (128, 2, 4)),
        ("llama-3.1-8b", 16, 8192, 1.0, (128, 2, 4)),
        ("llama-3.1-8b", 1, 8192, 1.0, (128, 2, 8)),
    ],
)
def test_heuristic_takes_what_was_measured_fastest(model, batch, cache, density, expected):
    tiles = heuristic(problem_of(AttentionCase(MODELS[model], batch, cache, density)), HOPPER)
    assert (tiles.block, tiles.stages, tiles.splits) == expected


def test_heuristic_fits_every_supported_shape():
    for width, queries, capacity in itertools.product(range(16, 257, 16), (1, 8, 9, 33, 64), (8, 1920)):
        for batch, selected in ((1, 1), (64, 8)):
            sizes = {"batch": batch, "groups": 8, "selected": selected}
            problem = Problem(queries=queries, width=width, capacity=capacity, **sizes)
            problem.require_supported()
            heuristic(problem, HOPPER).require_fit(problem, HOPPER)


def test_search_space_holds_the_heuristics_choice():
    for case in attention_cases():
        problem = problem_of(case)
        assert heuristic(problem, HOPPER) in set(search_space(problem, HOPPER)), str(case)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [({"block": 96}, "block must be"), ({"stages": 0}, "stages must be"), ({"splits": 9}, "splits must be")],
)
def test_tiles_validate_themselves(sizes, match):
    with pytest.raises(ValueError, match=match):
        Tiles(**sizes)


def test_tiles_that_do_not_fit_are_an_error():
    problem = Problem(batch=1, groups=1, queries=1, width=128, capacity=512, selected=1)
    with pytest.raises(ValueError, match="shared memory; got 232448 B"):
        Tiles(block=256, stages=4).require_fit(problem, HOPPER)


# ---- which implementation runs


def arguments(dtype="bfloat16", *, queries=2, width=64, capacity=64):
    q = jnp.zeros((2, 3, queries, width), dtype)
    cache = jnp.zeros((2, 3, capacity, width), dtype)
    return q, cache, cache, jnp.ones((2,), jnp.int32), jnp.zeros((2, 1), jnp.int32)


def test_best_backend_of_a_cpu_is_xla():
    with record_backends() as choices:
        sparse_decode_attention(*arguments(), scale=1.0)
    (choice,) = choices
    assert (choice.op, choice.backend) == ("sparse_decode_attention", "xla")
    ((name, reason),) = choice.rejected
    assert name == "mosaic"
    assert "needs an NVIDIA Hopper GPU" in reason


def test_best_backend_of_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(_device, "current", lambda *arrays: HOPPER)
    with record_backends() as choices:
        jax.eval_shape(functools.partial(sparse_decode_attention, scale=1.0), *arguments())
        jax.eval_shape(functools.partial(sparse_decode_attention, scale=1.0), *arguments("float32"))
    assert [choice.backend for choice in choices] == ["mosaic", "xla"]
    assert choices[0].rejected == ()
    assert choices[1].rejected == (("mosaic", "needs bfloat16 or float16; got float32"),)


def test_named_mosaic_is_lowered_for_a_gpu_and_named_in_profiles():
    call = jax.jit(functools.partial(sparse_decode_attention, scale=1.0, implementation="mosaic"))
    with record_backends() as choices:
        lowered = call.trace(*arguments()).lower(lowering_platforms=("cuda",))
    assert [choice.backend for choice in choices] == ["mosaic"]
    text = lowered.as_text(debug_info=True)
    assert "mosaic_gpu" in text
    assert "sparse_decode_attention.mosaic" in text


def test_named_mosaic_never_runs_something_else():
    with record_backends() as choices, pytest.raises(ValueError, match="CPU backend"):
        sparse_decode_attention(*arguments(), scale=1.0, implementation="mosaic")
    assert "xla" not in [choice.backend for choice in choices]


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({"dtype": "float32"}, "needs bfloat16 or float16"),
        ({"width": 40}, "multiple of 16"),
        ({"width": 272}, "up to 256"),
        ({"queries": 65}, "at most 64 query heads"),
        ({"capacity": 60}, "multiple of 8"),
    ],
)
def test_named_mosaic_says_what_it_cannot_do(shape, match):
    with pytest.raises(NotImplementedError, match=match):
        sparse_decode_attention(*arguments(**shape), scale=1.0, implementation="mosaic")


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"got 'triton', expected 'mosaic', 'xla' or None"):
        sparse_decode_attention(*arguments(), scale=1.0, implementation="triton")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"q": jnp.zeros((2, 3, 64), jnp.bfloat16)}, "q must be"),
        ({"q": jnp.zeros((2, 3, 0, 64), jnp.bfloat16)}, "q must be"),
        ({name: jnp.zeros((2, 3, 0, 64), jnp.bfloat16) for name in "kv"}, "must not be empty"),
        ({"k": jnp.zeros((2, 2, 64, 64), jnp.bfloat16)}, "k must be"),
        ({"v": jnp.zeros((2, 3, 72, 64), jnp.bfloat16)}, "v must have k's shape"),
        ({"v": jnp.zeros((2, 3, 64, 64), jnp.float16)}, "share a floating dtype"),
        ({"lengths": jnp.ones((3,), jnp.int32)}, "lengths must be"),
        ({"lengths": jnp.ones((2,), jnp.float32)}, "lengths must be"),
        ({"group_index": jnp.zeros((3, 1), jnp.int32)}, "group_index must be"),
        ({"group_index": jnp.zeros((2, 0), jnp.int32)}, "with k > 0"),
        ({"group_index": jnp.zeros((2, 1), bool)}, "group_index must be signed"),
        ({"scale": 0.0}, "scale must be"),
        ({"scale": np.float32(1)}, "scale must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"window": 0}, "window must be"),
        ({"window": True}, "window must be"),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
def test_bad_calls_are_errors(changes, match, implementation):
    names = ("q", "k", "v", "lengths", "group_index")
    call = dict(zip(names, arguments(), strict=True)) | {"scale": 1.0} | changes
    with pytest.raises(ValueError, match=f"^sparse_decode_attention: .*{match}.*; got .*, expected "):
        sparse_decode_attention(**call, implementation=implementation)


# ---- machine code for an H200


def named_kernels() -> list[tuple[AttentionCase, int | None]]:
    """Of the named workloads, and two with a window, enough for every pair of what the kernel depends on."""

    def kind(case: AttentionCase, window: int | None) -> tuple[object, ...]:
        problem = problem_of(case)
        tiles = choose(problem, "bfloat16", HOPPER)
        sizes = (problem.heads, problem.width), (tiles.block, tiles.stages), tiles.splits > 1
        return *sizes, case.density == 1, window

    longest = sorted(attention_cases(), key=lambda case: -case.cache_bytes)
    windowed = [AttentionCase(MODELS["mistral-7b"], batch, 8192, 0.5) for batch in (1, 256)]
    cases = [*((case, None) for case in longest), *((case, 4096) for case in windowed)]
    return covering_pairs(cases, lambda case: kind(*case))


@pytest.mark.parametrize(
    ("case", "window"), named_kernels(), ids=lambda x: str(x).replace(" ", "-") if x else "all"
)
def test_compiles_for_h200(case, window):
    problem = problem_of(case)
    cache = jax.ShapeDtypeStruct((case.batch, problem.groups, case.cache, problem.width), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((case.batch, problem.groups, problem.queries, problem.width), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    index = case.selected and jax.ShapeDtypeStruct((case.batch, case.selected), jnp.int32)
    scale = 0.0871  # of this test alone: a kernel that was compiled before is not reported again
    call = functools.partial(sparse_decode_attention, scale=scale, window=window, implementation="mosaic")
    program = aot.compile_for_h200(call, q, cache, cache, lengths, index)
    (kernel,) = program.kernels
    assert kernel.name.startswith("sparse_decode_attention")
    assert "wgmma.mma_async" in kernel.ptx
    tiles = choose(problem, "bfloat16", HOPPER)
    assert kernel.smem <= tiles.smem_bytes(problem)
    aot.assert_fit(program)
    assert_splits_meet_in_shared_memory(program, problem, tiles)


def assert_splits_meet_in_shared_memory(program: aot.Program, problem: Problem, tiles: Tiles) -> None:
    """No partial results in the device's memory, which takes the sequences' order alone, and their ranks."""
    words = problem.part_words if tiles.splits > 1 else 0
    (kernel,) = program.kernels
    assert kernel.ptx.count("st.async.shared::cluster") == words // (2 * 128)
    assert program.compiled.memory_analysis().temp_size_in_bytes < 1024 + 8 * problem.batch


def test_any_number_of_splits_meets_in_shared_memory(splits=3, queries=12, width=80):
    """Numbers that no named workload has."""
    shapes = [(2, 4, queries, width), (2, 4, 1920, width), (2, 4, 1920, width)]
    structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    structs += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (2, 2))]
    tiles = Tiles(block=64, stages=2, splits=splits)
    call = functools.partial(mosaic.sparse_decode_attention, scale=1.0, device=HOPPER, tiles=tiles)
    program = aot.compile_for_h200(call, *structs)
    aot.assert_fit(program)
    assert_splits_meet_in_shared_memory(program, Problem.of(shapes[0], shapes[1], 2), tiles)
