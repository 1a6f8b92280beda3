"""Selective MLP: the oracle and every implementation against NumPy; which one runs, and what is refused."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from bench.check_sparse_mlp import Check
from pallas_kernels import _device, record_backends, sparse_mlp
from pallas_kernels._device import HOPPER
from pallas_kernels.sparse_mlp import reference
from pallas_kernels.sparse_mlp.mosaic import launch as mosaic
from pallas_kernels.sparse_mlp.tiles import Tiles, heuristic, padded
from tests.tolerances import assert_close

# One consuming warpgroup: with two, the interpreter hung on a machine of two cores.
ROWS = Tiles(batch=16, groups=1, cols=128, stages=2, x_cols=64, x_slots=4, blocks=3, copy="rows", fused=False)
SMALL: Any = {"d_model": 128, "num_neurons": 90, "selected": 70, "batch": 5}
SILU: Any = {"activation": "silu", "gated": True}


def operands(check: Check) -> dict[str, jax.Array]:
    """Entries in no order, absent (-1 and beyond the end) and, where there are two, repeated; NaN in all other rows."""
    rng = np.random.default_rng(zlib.crc32(repr(check).encode()))
    index = rng.choice(check.num_neurons, check.selected, replace=False).astype(np.int32)
    index[-1] = index[0]
    gone = rng.choice(check.selected, check.absent, replace=False)
    index[gone] = np.where(np.arange(check.absent) % 2, check.num_neurons + 7, -1)
    unnamed = np.setdiff1d(np.arange(check.num_neurons), index)

    def draw(*shape, scale=1.0):
        values = rng.standard_normal(shape, np.float32) * scale
        values[unnamed] = np.nan
        return jnp.asarray(values, check.dtype)

    shape = (check.num_neurons, check.d_model)
    x = jnp.asarray(rng.standard_normal((check.batch, check.d_model), np.float32), check.dtype)
    made = {"x": x, "w_up": draw(*shape, scale=shape[1] ** -0.5)}
    made["w_down"] = draw(*shape, scale=check.selected**-0.5)
    if check.gated:
        made["w_gate"] = draw(*shape, scale=shape[1] ** -0.5)
    if check.bias:
        made |= {f"b_{name}": draw(shape[0]) for name in ("up", "gate")[: 1 + check.gated]}
    return made | {"index": jnp.asarray(index)}


def assert_right(check: Check, out: jax.Array) -> None:
    given = operands(check)
    assert out.dtype == given["x"].dtype
    want = hand(check)
    assert np.isfinite(want).all()
    assert_close(np.asarray(out, np.float32), want, "kernel", check.dtype)


def case_name(check: Check) -> str:
    above = f"-above-{check.threshold}" * (check.threshold > 0)
    kind = f"{check.activation}{above}{'-gated' * check.gated}{'-bias' * check.bias}"
    return f"{check.dtype}-{kind}-B{check.batch}-D{check.d_model}-k{check.selected}-absent{check.absent}"


CHECKS = [
    Check(**SMALL),
    Check(**SMALL, **SILU, dtype="float16"),
    Check(**(SMALL | {"absent": 70})),
    Check(**(SMALL | {"batch": 1, "selected": 1, "absent": 0}), bias=False),
    Check(**(SMALL | {"batch": 16, "d_model": 256, "selected": 90}), gated=True, threshold=0.5, bias=False),
    Check(**(SMALL | {"batch": 128, "selected": 64}), **SILU, bias=False),
    Check(**(SMALL | {"batch": 200, "selected": 65}), threshold=0.5, dtype="float16"),
]


def hand(check: Check) -> np.ndarray:
    """Neuron by neuron in float64, in the order of the index."""
    given = {name: np.asarray(value, np.float64) for name, value in operands(check).items()}
    out = np.zeros(given["x"].shape)
    relu = lambda a: np.where(a > check.threshold, a, 0)
    act = {"relu": relu, "silu": lambda a: a / (1 + np.exp(-a))}[check.activation]
    for j in operands(check)["index"].tolist():
        if 0 <= j < check.num_neurons:
            up = given["x"] @ given["w_up"][j] + (given["b_up"][j] if check.bias else 0)
            gate = up
            if check.gated:
                gate = given["x"] @ given["w_gate"][j] + (given["b_gate"][j] if check.bias else 0)
            hidden = act(gate) * up if check.gated else act(up)
            out += np.outer(hidden, given["w_down"][j])
    return out


@pytest.mark.parametrize("check", CHECKS[:5], ids=case_name)
def test_oracle_is_the_sum_over_the_index(check):
    check = dataclasses.replace(check, dtype="float32")
    found = reference.reference(**operands(check), activation=check.activation, threshold=check.threshold)
    assert_close(found, hand(check), "kernel", "float32")


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("check", CHECKS, ids=case_name)
def test_xla(check, dtype):
    check = dataclasses.replace(check, dtype=dtype or check.dtype)
    act = {"activation": check.activation, "threshold": check.threshold}
    call = functools.partial(sparse_mlp, **act, implementation="xla")
    assert_right(check, jax.jit(call)(**operands(check)))


@pytest.mark.parametrize("dtype", ["int8", "int64"])
def test_indices_of_any_width_and_numpy_arrays(dtype):
    """More neurons than int8 has numbers."""
    check = Check(num_neurons=300, d_model=128, selected=20, batch=5, dtype="float32")
    given = {name: np.asarray(value) for name, value in operands(check).items()}
    low = np.where(np.arange(20) % 3, np.nonzero(np.isfinite(given["w_up"][:, 0]))[0][0], -1)
    given["index"] = low.astype(dtype)
    want = reference.reference(**given | {"index": jnp.asarray(low, jnp.int32)}, activation="relu")
    assert_close(sparse_mlp(**given), want, "kernel", "float32")


@pytest.mark.parametrize("check", CHECKS[1:], ids=case_name)  # the last one has all that the first one has
def test_kernel_interpreted(check):
    interpreter.reset_gpu_interpret_mode_state()
    tiles = dataclasses.replace(ROWS, batch=padded(check.batch))
    act = {"activation": check.activation, "threshold": check.threshold}
    options = act | {"device": HOPPER, "tiles": tiles, "interpret": True}
    out = jax.block_until_ready(mosaic.sparse_mlp(**operands(check), **options))
    assert not interpreter.get_races().races_found
    assert_right(check, out)


@pytest.mark.parametrize(("threshold", "gated"), [(0.25, False), (0.01, True)])
def test_a_pre_activation_passes_only_above_the_threshold(threshold, gated):
    """Exact sums at the threshold and one step of float32 either side: each is a 16-bit value plus a bias."""
    edge = np.float32(threshold)
    steps = [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(1))]
    values = np.array([*steps, -edge, -1.0, 0.0, 1.0], np.float32)
    k, width = len(values), 128
    zeros = jnp.zeros((k, width), jnp.bfloat16)
    x = jnp.zeros((1, width), jnp.bfloat16).at[0, 0].set(1)
    down = jnp.zeros((k, width), jnp.bfloat16).at[jnp.arange(k), jnp.arange(k)].set(1)
    given = {"x": x, "w_up": zeros, "w_down": down, "b_up": jnp.asarray(values)}
    given["index"] = jnp.arange(k, dtype=jnp.int32)
    if gated:
        given |= {"w_gate": zeros, "b_gate": given["b_up"], "b_up": jnp.ones((k,), jnp.float32)}
    act = {"activation": "relu", "threshold": threshold}
    want = np.where(values > edge, values, 0)
    assert np.count_nonzero(want) == 2
    np.testing.assert_array_equal(reference.reference(**given, **act)[0, :k], want)
    found = {"xla": sparse_mlp(**given, **act, implementation="xla")}
    interpreter.reset_gpu_interpret_mode_state()
    found["mosaic"] = mosaic.sparse_mlp(**given, **act, device=HOPPER, tiles=ROWS, interpret=True)
    for out in found.values():
        assert_close(out[0, :k].astype(jnp.float32), want, "kernel", "bfloat16")
        np.testing.assert_array_equal(np.asarray(out[0, :k]) != 0, want != 0)


# ---- tiles


@pytest.mark.parametrize(
    ("batch", "selected", "groups"),
    [(16, 3712, 2), (64, 3712, 1), (16, 11136, 4), (64, 11136, 4), (16, 36864, 4), (64, 36864, 4)],
)
def test_heuristic_takes_what_was_measured_fastest(batch, selected, groups):
    tiles = heuristic(batch, 9216, HOPPER, selected=selected)
    assert (tiles.fused, tiles.cols, tiles.groups) == (True, 256, groups)


def test_every_width_and_batch_has_tiles():
    for d_model in range(128, 2049, 128):
        for batch in (1, 16, 17, 33, 64, 65, 128):
            for gated in (False, True):
                tiles = heuristic(batch, d_model, HOPPER, selected=100, gated=gated)
                assert tiles.batch >= batch
                assert d_model % tiles.cols == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch": 8}, "batch must be one of"),
        ({"cols": 96}, "cols must be a multiple"),
        ({"stages": 0}, "must be positive"),
        ({"fused": True}, "rows can't be fused"),
        ({"stages": 40}, "too much shared memory"),
        ({"batch": 128, "groups": 4}, "sums need too many registers"),
    ],
)
def test_tiles_validate_themselves(change, match):
    with pytest.raises(ValueError, match=f"^sparse_mlp tiles: .*{match}"):
        dataclasses.replace(ROWS, **change)


# ---- which implementation runs


def arguments(dtype="bfloat16", *, d_model=128, batch=4) -> dict[str, Any]:
    weight = jnp.ones((256, d_model), dtype)
    index = jnp.arange(128, dtype=jnp.int32)
    return {"x": jnp.ones((batch, d_model), dtype), "w_up": weight, "w_down": weight, "index": index}


def test_best_backend_of_a_cpu_is_xla():
    with record_backends() as choices:
        sparse_mlp(**arguments())
    (choice,) = choices
    assert (choice.op, choice.backend) == ("sparse_mlp", "xla")
    assert choice.rejected[0][0] == "mosaic"
    assert "needs an NVIDIA Hopper GPU" in choice.rejected[0][1]


def test_best_backend_of_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(_device, "current", lambda *arrays: HOPPER)
    with record_backends() as choices:
        jax.eval_shape(lambda: sparse_mlp(**arguments()))
        jax.eval_shape(lambda: sparse_mlp(**arguments("float32")))
    assert [choice.backend for choice in choices] == ["mosaic", "xla"]
    assert "needs bfloat16 or float16" in choices[1].rejected[0][1]


def test_named_mosaic_is_lowered_for_a_gpu_and_named_in_profiles():
    call = jax.jit(functools.partial(sparse_mlp, implementation="mosaic"))
    text = call.trace(**arguments()).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert "mosaic_gpu" in text
    assert "sparse_mlp.mosaic" in text


@pytest.mark.parametrize(
    ("changes", "activation", "match"),
    [
        ({"dtype": "float32"}, "relu", "needs bfloat16 or float16"),
        ({"d_model": 64}, "relu", "multiple of 128; got 64"),
        ({}, "gelu", "supports the activations relu, silu; got gelu"),
    ],
)
def test_named_mosaic_says_what_it_cannot_do(changes, activation, match):
    with pytest.raises(NotImplementedError, match=match) as raised:
        sparse_mlp(**arguments(**changes), activation=activation, implementation="mosaic")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": jnp.zeros((4,))}, "x must be"),
        ({"w_up": jnp.zeros((256, 64), jnp.bfloat16)}, "w_up must be"),
        ({"w_down": jnp.zeros((255, 128), jnp.bfloat16)}, "w_down doesn't fit"),
        ({"w_down": jnp.zeros((256, 128), jnp.float16)}, "w_down must have w_up's dtype"),
        ({"b_up": jnp.zeros((255,), jnp.bfloat16)}, "b_up doesn't fit"),
        ({"b_up": jnp.zeros((256,), jnp.int32)}, "b_up must be floating"),
        ({"b_gate": jnp.zeros((256,), jnp.bfloat16)}, "b_gate without w_gate"),
        ({"index": jnp.zeros((0,), jnp.int32)}, "index must be"),
        ({"index": jnp.zeros((3,), jnp.uint32)}, "index must be"),
        ({"activation": "tanh"}, "unknown activation"),
        ({"threshold": -0.01}, "unusable threshold"),
        ({"threshold": float("nan")}, "unusable threshold"),
        ({"threshold": float("inf")}, "unusable threshold"),
        ({"threshold": "0.01"}, "unusable threshold"),
        ({"threshold": 0.01, "activation": "silu"}, "a threshold needs activation relu"),
        ({"implementation": "triton"}, "unknown implementation"),
    ],
)
def test_bad_calls_are_errors(changes, match):
    with pytest.raises(ValueError, match=f"^sparse_mlp: .*{match}.*; got .*, expected ") as raised:
        sparse_mlp(**arguments() | changes)
    assert "\n" not in str(raised.value)
