"""JAX's own switches: every public function gives with each of them what it gives without."""

import dataclasses
import functools
import itertools
import json
import pickle
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import polarjax as pj
from polarjax import evaluation, sparsity
from polarjax.sparsity.options import TrainOptions
from tests.model import zoo
from tests.several_devices import printed
from tests.sparsity import planted
from tests.text import hf_tokenizers
from tests.tolerances import assert_close

DEVICES = 4


class Inputs(NamedTuple):
    """What the functions need; all of it is on the device."""

    model: pj.Decoder
    tokens: jax.Array
    lengths: jax.Array
    cache: pj.KVCache
    key: jax.Array
    selected: pj.Sparsity


@functools.cache
def inputs(dtype: str = "bfloat16") -> Inputs:
    """Four prompts, so that each of four devices gets one."""
    model = zoo.model("opt", dtype)
    selected = pj.Sparsity(zoo.routers("opt", dtype), zoo.half(model.config))
    cache = zoo.empty_cache(model, DEVICES, capacity=16)
    return Inputs(model, *zoo.batch(DEVICES), cache, jax.random.key(0), selected)


def forward(given: Inputs):
    """Sparse logits; `score` has the dense ones."""
    logits, _ = pj.forward(*given[:3], sparsity=given.selected)
    valid = (
        jnp.arange(given.tokens.shape[1], dtype=jnp.int32)[None] < given.lengths.astype(jnp.int32)[:, None]
    )
    return jnp.where(valid[..., None], logits, jnp.float32(0))


def step(given: Inputs):
    """Prefill of a cache, then a dense and a sparse step with it."""
    first, cache = pj.prefill(*given[:4])
    dense, _ = pj.decode_step(given.model, given.lengths, cache)
    sparse, cache = pj.decode_step(given.model, given.lengths, cache, sparsity=given.selected)
    return first, dense, sparse, cache.length


def generate(given: Inputs):
    """Drawn tokens of the sparse model."""
    options = {"max_new_tokens": 4, "stop_ids": (3,), "repetition_penalty": 1.1, "sparsity": given.selected}
    sampler = pj.Categorical(temperature=0.7, top_k=5, top_p=0.9)
    made = pj.generate(*given[:3], given.key, sampler=sampler, **options)
    seeded = pj.generate(*given[:3], 0, sampler=sampler, **options)  # the same key
    return made.tokens, made.lengths, made.stopped, seeded.tokens


def complete(given: Inputs):
    """Drawn tokens of prompts that are texts, two at a time, by a seed."""
    bundle = pj.Bundle(given.model, hf_tokenizers.of_letters(zoo.VOCAB))
    made = bundle.complete(["abc", "d", "ef"], max_new_tokens=4, sampler=pj.Categorical(0.7), batch_size=2)
    return [each.tokens for each in made]


def init_cache(given: Inputs):
    """An empty cache."""
    return pj.init_cache(given.model.config, batch_size=DEVICES, capacity=8, dtype=given.model.dtype)


def stream(given: Inputs):
    """Greedy tokens of the dense model and their log-probabilities, in three pieces, the last one cut."""
    pieces = pj.stream(*given[:3], max_new_tokens=12, logprobs=1)
    return [(each.tokens, each.lengths, each.stopped, each.logprobs) for each in pieces]


def run_engine(given: Inputs):
    """Drawn and greedy tokens of requests that are read one at a time and in pieces; their log-probabilities."""
    made = pj.Engine(pj.Bundle(given.model), slots=2, capacity=24, read_tokens=8)
    lengths = jax.device_get(given.lengths)
    for i, row in enumerate(jax.device_get(given.tokens)):
        options = {"sampler": pj.Categorical(0.7, top_k=9, top_p=0.9), "repetition_penalty": 1.1} if i else {}
        made.submit(row[: lengths[i]], max_new_tokens=5, seed=i, logprobs=1, **options)
    return [(event.request, event.tokens, event.logprobs) for event in made]


def collect(given: Inputs):
    """Recorded norms and activity."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"held_out": (0.3, 0.3), "batch_size": DEVICES}
        seen = sparsity.collect(given.model, jax.device_get(given.tokens), Path(folder, "seen"), **options)
        return np.array(seen.norms), np.array(seen.activity)


def learn(given: Inputs):
    """Routers trained on activations."""
    quick = TrainOptions(max_epochs=1, rank=4, neuron_batch=64, group_batch=64)
    return sparsity.train_routers(activations(), planted.CONFIG, given.key, options=quick)[0]


@functools.cache
def activations():
    """A few recorded tokens."""
    return planted.activations(200, dtype="bfloat16")


def score(given: Inputs):
    """Losses of a dense and a sparse model."""
    measure = functools.partial(evaluation.perplexity, given.model, jax.device_get(given.tokens))
    return measure().token_nll, measure(sparsity=given.selected).token_nll


def agreement(given: Inputs):
    """Two models side by side, decoding."""
    windows = jax.device_get(given.tokens)
    found = evaluation.agreement(given.model, windows, given.selected, mode="decode", context=2)
    return found.top1, found.kl


def sweep(given: Inputs):
    """Masked, with a selector that draws too."""
    bundle = pj.Bundle(given.model, routers=given.selected.routers)
    options = {
        "densities": (0.5,),
        "selectors": ("router", "random"),
        "neurons": "dense",
        "protocols": ["masked"],
    }
    made = evaluation.sweep(bundle, jax.device_get(given.tokens), **options)
    return [dataclasses.astuple(each) for row in made.rows for each in (row.kl, row.top1)]


FUNCTIONS = {
    "forward": zoo.jit(forward),
    "step": zoo.jit(step),
    "init_cache": init_cache,
    "generate": generate,
    "complete": complete,
    "stream": stream,
    "engine": run_engine,
    "collect": collect,
    "learn": learn,
    "score": score,
    "agreement": agreement,
    "sweep": sweep,
}
TRACEABLE = {"forward": forward, "step": step, "generate": generate}
COMPILED_INSIDE = ("forward", "step")
"""Of these tracing is enough where `score`, and `generate` and `stream`, run with the same switch."""


@functools.cache
def expected(function: str):
    """The function's results without a switch."""
    return jax.device_get(FUNCTIONS[function](inputs()))


def assert_alike(got, want):
    """Whole numbers are equal, others close."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if np.issubdtype(np.asarray(b).dtype, np.integer) or np.asarray(b).dtype == bool:
            np.testing.assert_array_equal(a, b)
        else:
            assert_close(a, b, "rounding", "bfloat16")


def assert_shapes(got, want):
    """Shapes and dtypes are equal, for what was traced only."""
    kind = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(kind, got) == jax.tree.map(kind, want)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_x64(function):
    """The prompts are int64 too, as NumPy makes them."""
    with jax.enable_x64(True):
        given = inputs()
        wide = given._replace(tokens=given.tokens.astype("int64"), lengths=given.lengths.astype("int64"))
        if function in COMPILED_INSIDE:
            assert_shapes(jax.eval_shape(TRACEABLE[function], wide), expected(function))
            return
        got = FUNCTIONS[function](wide)
    assert_alike(jax.device_get(got), expected(function))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_implicit_transfers(function):
    """With programs that are compiled already, since tracing moves constants."""
    want = expected(function)
    with jax.transfer_guard("disallow"):
        got = FUNCTIONS[function](inputs())
    assert_alike(jax.device_get(got), want)


STRICT = [(name, "bfloat16") for name in FUNCTIONS] + [(name, "float16") for name in ("forward", "generate")]


@pytest.mark.parametrize(("function", "dtype"), STRICT)
def test_strict_promotion(function, dtype):
    """The switch only refuses, while tracing, so what can be traced need not run."""
    want, given = expected(function), inputs(dtype)
    with jax.numpy_dtype_promotion("strict"):
        if function in TRACEABLE:
            got = jax.eval_shape(TRACEABLE[function], given)
            assert_shapes(got, want)
        else:
            assert_alike(jax.device_get(FUNCTIONS[function](given)), want)


def test_symbolic_batch():
    """One exported program, dense and sparse, serves every number of sequences."""
    given, (B,) = inputs(), export.symbolic_shape("B")
    rows = lambda given: (given.tokens, given.lengths, given.cache)
    run = lambda tokens, lengths, cache: step(given._replace(tokens=tokens, lengths=lengths, cache=cache))
    many = lambda leaf: jax.ShapeDtypeStruct((B, *leaf.shape[1:]), leaf.dtype)
    program = export.export(jax.jit(run))(*jax.tree.map(many, rows(given)))
    assert_alike(program.call(*rows(given)), expected("step"))
    one = jax.tree.map(lambda leaf: leaf[:1], rows(given))
    first, dense, sparse, length = program.call(*one)
    alone = jax.tree.map(lambda leaf: leaf[:1], expected("step"))
    assert_alike((first, dense, length), (alone[0], alone[1], alone[3]))
    assert sparse.shape == dense.shape


def on_mesh(folder: str) -> None:
    """Runs in a process with four devices; prints what differs, by function and kind of prompts.

    Training is not among the functions: what it reads is on the disk. An engine runs on one device.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",))
    everywhere, by_row = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    want = pickle.loads(Path(folder, "expected").read_bytes())
    whole = jax.device_put(inputs(), everywhere)
    rows = jax.device_put((whole.tokens, whole.lengths, whole.cache), by_row)
    split = whole._replace(tokens=rows[0], lengths=rows[1], cache=rows[2])
    faults = {}
    for name, kind in itertools.product(
        FUNCTIONS.keys() - {"learn", "engine"}, ("replicated", "row-sharded")
    ):
        try:
            if kind == "row-sharded":
                assert_alike(jax.device_get(FUNCTIONS[name](split)), want[name])
            elif name in COMPILED_INSIDE:
                assert_shapes(jax.eval_shape(TRACEABLE[name], whole), want[name])
            else:
                assert_alike(jax.device_get(FUNCTIONS[name](whole)), want[name])
        except Exception as error:
            faults[f"{name}, {kind}"] = f"{type(error).__name__}: {error}"[:600]
    device = jax.devices()[1]
    with jax.default_device(device):
        loaded = pj.load(Path(folder, "model")).model
    elsewhere = [leaf for leaf in jax.tree.leaves(loaded) if leaf.devices() != {device}]
    print(json.dumps({"faults": faults, "elsewhere": len(elsewhere)}))


def test_explicit_mesh(tmp_path):
    """A replicated model, with prompts on all devices or one on each, makes one device's numbers."""
    want = {name: expected(name) for name in FUNCTIONS}
    (tmp_path / "expected").write_bytes(pickle.dumps(want))
    pj.save(tmp_path / "model", pj.Bundle(inputs().model))
    text = printed(f"from tests import test_switches; test_switches.on_mesh({str(tmp_path)!r})", DEVICES)
    assert json.loads(text.splitlines()[-1]) == {"faults": {}, "elsewhere": 0}
