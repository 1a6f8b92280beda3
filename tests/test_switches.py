"""JAX's own switches: every public function gives with each of them what it gives without."""

import functools
import itertools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import polarjax as pj
from polarjax import evaluation, sparsity
from polarjax.model.taps import TapSpec
from polarjax.sparsity.options import CalibrateOptions, TrainOptions
from tests.model import zoo
from tests.tolerances import assert_close

DTYPES = ("float32", "bfloat16", "float16")
SWITCHES = {
    "x64": (lambda: jax.enable_x64(True), DTYPES[:2]),
    "strict promotion": (lambda: jax.numpy_dtype_promotion("strict"), DTYPES),
    "no transfers": (lambda: jax.transfer_guard("disallow"), DTYPES[:1]),
}


def forward(model, tokens, lengths, selected):
    logits, taps = zoo.jit(functools.partial(pj.forward, taps=TapSpec()))(
        model, tokens, lengths, sparsity=selected
    )
    valid = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    return jnp.where(valid[..., None], logits, jnp.float32(0)), taps.activity


def step(model, tokens, lengths, selected):
    """Prefill of a cache, and one step with it."""
    cache = zoo.empty_cache(model, len(lengths))
    first, cache = zoo.prefill(model, tokens, lengths, cache)
    last, cache = zoo.decode_step(model, lengths, cache, sparsity=selected)
    return first, last, cache.length


def generate(model, tokens, lengths, selected):
    made = pj.generate(model, tokens, lengths, max_new_tokens=4, stop_ids=(3,), sparsity=selected)
    return made.tokens, made.lengths


def draw(model, tokens, lengths, selected):
    made = pj.generate(
        model,
        tokens,
        lengths,
        jax.random.key(0),
        sampler=pj.Categorical(temperature=0.7, top_k=5, top_p=0.9),
        max_new_tokens=4,
        repetition_penalty=1.1,
        sparsity=selected,
    )
    return made.tokens, made.lengths


def learn(model, tokens, lengths, selected):
    """Recording, training and calibration."""
    windows = np.tile(np.asarray(tokens), (4, 1))
    few = CalibrateOptions(batch_sizes=(1, 2), num_batches=2)
    quick = TrainOptions(max_epochs=1, rank=8, neuron_batch=16, group_batch=16)
    with tempfile.TemporaryDirectory() as folder:
        seen = sparsity.collect(model, windows, Path(folder, "seen"), held_out=(0.3, 0.3))
        routers, _ = sparsity.train_routers(seen, model.config, jax.random.key(0), options=quick)
        table = sparsity.calibrate(seen, routers, model.config, key=jax.random.key(1), options=few)
        table.for_batch(2, model.config)
        return (np.asarray(seen.norms),)


def score(model, tokens, lengths, selected):
    windows = np.asarray(tokens)
    measured = evaluation.perplexity(model, windows, sparsity=selected)
    alike = evaluation.agreement(model, windows, selected)
    return np.float32(measured.nll), np.float32(alike.top1)


FUNCTIONS = (forward, step, generate, draw, learn, score)


@functools.cache
def call(function, dtype):
    """The function's results without a switch, and its arguments."""
    model = zoo.model("opt", dtype)
    selected = pj.Sparsity(zoo.routers("opt", dtype), zoo.half(model.config))
    arguments = (model, *zoo.batch(), selected)
    return arguments, jax.device_get(function(*arguments))


def assert_alike(got, expected, dtype):
    """Whole numbers are equal, others close."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if np.issubdtype(np.asarray(b).dtype, np.floating):
            assert_close(a, b, "rounding", "float32" if dtype == "float32" else "bfloat16")
        else:
            np.testing.assert_array_equal(a, b)


CASES = [
    (switch, dtype, function)
    for switch, (_, dtypes) in SWITCHES.items()
    for dtype, function in itertools.product(dtypes, FUNCTIONS)
    if switch != "no transfers" or function is generate  # the others are handed host data, or make some
]


@pytest.mark.parametrize(("switch", "dtype", "function"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_switch(switch, dtype, function):
    arguments, expected = call(function, dtype)
    with SWITCHES[switch][0]():
        got = function(*arguments)
    assert_alike(jax.device_get(got), expected, dtype)


def test_symbolic_batch():
    """One exported program serves every number of sequences."""
    (model, _, _, selected), _ = call(step, "float32")
    (B,) = export.symbolic_shape("B")
    token = jax.ShapeDtypeStruct((B,), jnp.int32)
    many = lambda leaf: jax.ShapeDtypeStruct((B, *leaf.shape[1:]), leaf.dtype)
    program = jax.jit(lambda token, cache: pj.decode_step(model, token, cache, sparsity=selected))
    exported = export.export(program)(token, jax.tree.map(many, zoo.empty_cache(model, 1)))
    for rows in (1, 3):
        tokens, cache = jnp.arange(rows, dtype=jnp.int32), zoo.empty_cache(model, rows)
        expected = zoo.decode_step(model, tokens, cache, sparsity=selected)
        assert_alike(exported.call(tokens, cache), expected, "float32")
