"""Selection: every implementation against a stable sort on the host, which one runs, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels import _device, record_backends, select_top_k
from pallas_kernels._device import HOPPER
from pallas_kernels.selection import mosaic, portable, reference, tiles, xla
from tests.kernels.races import race_found

SHORT = ((1, 1), (7, 3), (72, 1), (72, 36), (72, 72), (256, 100), (513, 64), (700, 700))  # (n, k)
LONG = ((257, 256), (5000, 640), (40960, 4096))
KINDS = ("distinct", "ties", "equal", "negative", "odd", "zeros")


def scores_of(kind: str, n: int, rows: int = 3) -> np.ndarray:
    """float32 [rows n]; sums over the rows are exact where they matter."""
    rng = np.random.default_rng(n)
    whole = np.stack([rng.permutation(n) for _ in range(rows)]) - n // 2
    if kind == "odd":
        for start, value in ((0, -0.0), (1, 0.0), (2, np.inf), (3, -np.inf), (4, np.nan), (5, -np.nan)):
            whole = whole.astype(np.float32)
            whole[:, start::11] = value
    if kind == "ties":
        whole = whole // 9
    if kind == "equal":
        whole = np.ones_like(whole)
    if kind == "zeros":
        whole = np.where(whole % 3 == 0, 0.0, -0.0)
    if kind == "negative":
        whole = -np.abs(whole) - 1
    return whole.astype(np.float32)


def by_hand(scores: np.ndarray, k: int, shared: bool) -> np.ndarray:
    """One entry after the other: (NaN as -inf, index) in Python's own order."""
    if shared:
        scores = np.where(scores <= 0, 0, scores).sum(0, keepdims=True)
    order = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i)) for row in _ordered(scores)]
    chosen = np.array([sorted(row[:k]) for row in order], np.int32)
    return chosen[0] if shared else chosen


def _ordered(scores: np.ndarray) -> list[list[float]]:
    return np.where(np.isnan(scores), -np.inf, scores).tolist()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
@pytest.mark.parametrize(("n", "k"), [*SHORT, *LONG])
def test_xla_and_reference(n, k, shared):
    call = jax.jit(functools.partial(select_top_k, k=k, shared=shared, implementation="xla"))
    for kind in KINDS:
        scores = scores_of(kind, n)
        want = by_hand(scores, k, shared)
        for made in (call(scores), reference.reference(jnp.asarray(scores), k, shared=shared)):
            assert made.dtype == jnp.int32
            np.testing.assert_array_equal(made, want, err_msg=kind)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_scores_are_pooled_in_float32(dtype):
    """256 ones and a 257th score: the sum 257 has no place in bfloat16."""
    scores = np.ones((257, 300), np.float32)
    scores[0, :299] = 0
    made = select_top_k(jnp.asarray(scores, dtype), 1, shared=True)
    np.testing.assert_array_equal(made, [299])


# ---- the Hopper kernel's search, in the interpreter


@functools.cache
def kernel(k: int, shared: bool):
    return jax.jit(functools.partial(mosaic.select_top_k, k=k, shared=shared, device=HOPPER, interpret=True))


def interpreted(scores: np.ndarray, k: int, shared: bool) -> jax.Array:
    """races_found() then says whether two accesses were unordered."""
    interpreter.reset_gpu_interpret_mode_state()
    return jax.block_until_ready(kernel(k, shared)(jnp.asarray(scores)))


def races_found() -> bool:
    return interpreter.get_races().races_found


EVERY_KIND = (
    (72, 36),
    (513, 64),
    (5000, 640),
)  # rows alone, pooled rows, and rows with several entries a thread


@pytest.mark.parametrize(
    ("n", "k", "kind"),
    [
        *((*size, kind) for size in EVERY_KIND for kind in KINDS),
        *((*size, kind) for size in SHORT if size not in EVERY_KIND for kind in ("distinct", "odd")),
    ],
)
def test_interpreted(n, k, kind):
    shared = n > 256
    scores = scores_of(kind, n, rows=2)
    found = interpreted(scores, k, shared)
    assert not races_found()
    np.testing.assert_array_equal(found, by_hand(scores, k, shared))


def test_interpreted_over_the_whole_range_of_floats():
    """The smallest and largest floats, both signs, and neighbours: as many passes as there can be."""
    small, large = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    row = np.array([large, -large, small, -small, 1, np.nextafter(np.float32(1), np.float32(2))] * 50)
    for n in (300, 600):
        scores = np.resize(row, (1, n)).astype(np.float32)
        for k in (n // 3 + 1, n - 1):
            found = interpreted(scores, k, shared=False)
            np.testing.assert_array_equal(found, by_hand(scores, k, shared=False))


def test_race_detection_sees_a_missing_barrier(monkeypatch):
    monkeypatch.setattr(portable, "_sync", lambda barrier: None)
    kernel.cache_clear()
    assert race_found(lambda: interpreted(scores_of("distinct", 601), 50, shared=False))


@pytest.mark.parametrize("n", [1, 511, 512, 513, 4096, 4097, 11008, tiles.MAX_ROW])
def test_tiles_hold_the_row(n):
    threads = 128 * tiles.warpgroups(n)
    assert n <= tiles.padded(n) == 4 * threads * tiles.quads(n)
    assert 2 ** tiles.digit(n) == 2 * threads


# ---- transformations


def test_vmap_and_scan():
    scores = np.stack([scores_of("ties", 300), scores_of("distinct", 300)])
    call = functools.partial(select_top_k, k=40, implementation="xla")
    for shared in (True, False):
        want = [by_hand(one, 40, shared) for one in scores]
        np.testing.assert_array_equal(
            jax.vmap(functools.partial(call, shared=shared))(jnp.asarray(scores)), want
        )
        step = lambda carry, one, shared=shared: (carry, call(one, shared=shared))
        np.testing.assert_array_equal(lax.scan(step, 0, jnp.asarray(scores))[1], want)


# ---- which implementation runs


def test_best_backend_of_a_cpu_is_xla():
    with record_backends() as choices:
        select_top_k(jnp.zeros((2, 300)), 3, shared=True)
    (choice,) = choices
    assert (choice.op, choice.backend) == ("select_top_k", "xla")
    ((name, reason),) = choice.rejected
    assert name == "mosaic"
    assert "needs an NVIDIA Hopper GPU" in reason


@pytest.mark.parametrize(("n", "backend"), [(8, "mosaic"), (36864, "mosaic"), (36865, "xla")])
def test_best_backend_of_a_hopper_gpu(monkeypatch, n, backend):
    monkeypatch.setattr(_device, "current", lambda *arrays: HOPPER)
    with record_backends() as choices:
        jax.eval_shape(functools.partial(select_top_k, k=3, shared=False), jnp.zeros((2, n)))
    assert [choice.backend for choice in choices] == [backend]
    if backend == "xla":
        assert choices[0].rejected == (("mosaic", "needs rows of up to 36864 entries; got 36865"),)


def test_named_mosaic_never_runs_something_else():
    with record_backends() as choices, pytest.raises(ValueError, match="CPU backend"):
        select_top_k(jnp.zeros((2, 300)), 3, shared=True, implementation="mosaic")
    assert "xla" not in [choice.backend for choice in choices]
    with pytest.raises(NotImplementedError, match="rows of up to 36864 entries; got 40000"):
        select_top_k(jnp.zeros((1, 40000)), 3, shared=True, implementation="mosaic")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scores": jnp.zeros((300,))}, "scores must be"),
        ({"scores": jnp.zeros((0, 300))}, "scores must be"),
        ({"scores": jnp.zeros((2, 300), jnp.int32)}, "scores must be floating"),
        ({"k": 0}, "k must be"),
        ({"k": 301}, r"k must be .* got 301, expected 1\.\.300"),
        ({"k": True}, "k must be"),
        ({"k": np.int64(3)}, r"k must be .* got np.int64\(3\)"),
        ({"scores": jnp.zeros((2, 0))}, "scores must be"),
        ({"shared": 1}, "shared must be a Python bool"),
        ({"k": 2.0}, "k must be"),
        ({"implementation": "triton"}, "got 'triton', expected 'mosaic', 'xla' or None"),
    ],
)
def test_bad_calls_are_errors(changes, match):
    call = {"scores": jnp.zeros((2, 300)), "k": 3, "shared": True} | changes
    with pytest.raises(ValueError, match=f"^select_top_k: .*{match}") as caught:
        select_top_k(**call)
    assert "\n" not in str(caught.value)


def test_ranks_and_sort_agree():
    scores = jnp.asarray(scores_of("ties", xla.RANKING_LIMIT))
    for k in (1, 100, xla.RANKING_LIMIT):
        np.testing.assert_array_equal(xla._by_rank(scores, k), xla._by_sort(scores, k))
