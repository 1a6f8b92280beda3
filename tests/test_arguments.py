"""Arguments as people pass them to public functions: each works, or is one clear line of a PolarjaxError."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from checkpoints_convert import convert_checkpoint, describe_checkpoint, export_checkpoint
from polarjax import evaluation, sparsity
from polarjax.generation.token_loop import Generation
from polarjax.model.taps import TapSpec
from polarjax.sparsity.options import CalibrateOptions, CollectOptions, TrainOptions
from tests.model import zoo
from tests.text import hf_tokenizers

MODEL = zoo.model("opt")
CONFIG = MODEL.config
TOKENS, LENGTHS = zoo.batch()
BUNDLE = pj.Bundle(MODEL)
WINDOWS = np.asarray(TOKENS)
RAGGED = [[1, 2, 3], [1, 2]]
PLAN = zoo.half(CONFIG)
SPARSE = pj.Sparsity(zoo.routers("opt"), PLAN)
TABLE = pj.PlanTable(
    num_layers=2,
    num_neurons=CONFIG.d_ff,
    num_groups=CONFIG.num_kv_heads,
    batch_sizes=(1, 2),
    neurons=((8, 8), (16, None)),
    recall=((1.0, 1.0), (1.0, 1.0)),
)
SPARSE_BUNDLE = pj.Bundle(MODEL, routers=SPARSE.routers, plans=TABLE)
JUNK = (3, "a", object(), [1])
NOT_COUNTS = (-1, 0, 2.5, True, "a", None, [1])
NOT_SIZES = (*NOT_COUNTS, 10**30)
NO_TEXTS = (3, "a", b"a", [""], [3], np.array(2), jnp.array(2), object())
NO_LIST = (3, 2.5, "a", b"a", np.array(2), jnp.array(2), object())


def names(value):
    """A short id of a case."""
    return getattr(value, "__name__", None) or str(value)[:30].replace("\n", "")


def one_line(function, *args, **kwargs):
    """Passes if the call raises one line that is polarjax's own, and of the argument, not of a default's value."""
    with pytest.raises(pj.PolarjaxError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert "never-made" not in str(caught.value)


def generate(model=MODEL, tokens=TOKENS, lengths=LENGTHS, key=None, **given):
    return pj.generate(model, tokens, lengths, key, **{"max_new_tokens": 2} | given)


def stream(model=MODEL, tokens=TOKENS, lengths=LENGTHS, key=None, **given):
    return pj.stream(model, tokens, lengths, key, **{"max_new_tokens": 2} | given)


def forward(model=MODEL, tokens=TOKENS, lengths=LENGTHS, **given):
    return pj.forward(model, tokens, lengths, **given)


def prefill(model=MODEL, tokens=TOKENS, lengths=LENGTHS, cache=None):
    return pj.prefill(model, tokens, lengths, zoo.empty_cache(MODEL, 3) if cache is None else cache)


def decode_step(model=MODEL, token=LENGTHS, cache=None, **given):
    return pj.decode_step(model, token, zoo.empty_cache(MODEL, 3) if cache is None else cache, **given)


def init_cache(config=CONFIG, **given):
    return pj.init_cache(config, **{"batch_size": 1, "capacity": 8} | given)


def perplexity(model=MODEL, windows=WINDOWS, **given):
    return evaluation.perplexity(model, windows, **given)


def agreement(model=MODEL, windows=WINDOWS, selected=SPARSE, **given):
    return evaluation.agreement(model, windows, selected, **given)


def decode_bytes(config=CONFIG, **given):
    return pj.costs.decode_bytes(config, **{"batch_size": 1, "cache_length": 8} | given)


def decode_flops(config=CONFIG, **given):
    return pj.costs.decode_flops(config, **{"batch_size": 1, "cache_length": 8} | given)


def largest_batch(config=CONFIG, **given):
    return pj.costs.largest_batch(config, **{"memory": 1e9, "cache_length": 8} | given)


def sparsify(model=MODEL, windows=WINDOWS, key=0, **given):
    return sparsity.sparsify(model, windows, key, **given)


def complete(prompts=("a", "b", "c"), **given):
    bundle = pj.Bundle(MODEL, hf_tokenizers.of_letters(zoo.VOCAB))
    return bundle.complete(prompts, **{"max_new_tokens": 2} | given)


@functools.cache
def engine():
    return pj.Engine(pj.Bundle(MODEL), slots=2, capacity=16)


def submit(prompt=(1, 2), **given):
    return engine().submit(prompt, **{"max_new_tokens": 2} | given)


def sweep(model=SPARSE_BUNDLE, windows=WINDOWS, **given):
    return evaluation.sweep(model, windows, **given)


def collect(model=MODEL, windows=WINDOWS, out_dir="never-made", **given):
    return sparsity.collect(model, windows, out_dir, **given)


def convert(src="never-made", out="out", **given):
    return convert_checkpoint(src, out, **given)


def describe(src="never-made", **given):
    return describe_checkpoint(src, **given)


def export(src="never-made", out="out", **given):
    return export_checkpoint(src, out, **given)


def save(path="never-made", bundle=BUNDLE, **given):
    return pj.save(path, bundle, **given)


MODELS = (None, *JUNK, pj.Decoder)
PROMPTS = (RAGGED, None, "a", 3, 2.5, [[1.5]], [[]], [1, 2], [[["a"]]], np.ones((3, 9)), object())
LENGTH = (None, 3, "a", [3], [1.0, 2.0, 3.0], [[1, 2, 3]], object())
SPARSITIES = (PLAN, TABLE, pj.Sparsity, zoo.routers("opt"), 3, "a", pj.Sparsity(None, PLAN))  # type: ignore[arg-type]
SPARSITIES += (pj.Sparsity(zoo.routers("opt"), (1, 2)), pj.Sparsity(3, PLAN))  # type: ignore[arg-type]
IMPLEMENTATIONS = ("cuda", 3, [1], True)
GENERATE = {
    "model": MODELS,
    "tokens": PROMPTS,
    "lengths": LENGTH,
    "max_new_tokens": NOT_SIZES,
    "num_return_sequences": (*NOT_SIZES, 2),  # greedy
    "stop_ids": ("a", [[1]], 2.5, True, -1, 2**31, object(), b"a", {}),
    "sparsity": SPARSITIES,
    "sampler": (None, "greedy", pj.Greedy, 3, lambda: 0, {}),
    "implementation": IMPLEMENTATIONS,
    "repetition_penalty": (None, "a", float("nan"), 0, -1.0, True, [1.0]),
    "key": (2.5, "a", True, np.zeros(3, np.uint32), np.zeros((2, 2), np.uint32), object()),
}
SCORE = {
    "model": MODELS,
    "windows": PROMPTS,
    "batch_size": NOT_COUNTS,
    "context": (-1, 99, 2.5, "a", None),
    "mode": ("x", None, 3, [1]),
    "scored": (3, "a", np.ones((3, 9)), np.ones((2, 9), bool), RAGGED),
}
COUNTED = {"config": (None, *JUNK), "batch_size": NOT_COUNTS, "cache_length": NOT_COUNTS}
COUNTED |= {"plan": JUNK, "router_rank": NOT_COUNTS[:5]}
DTYPE = (3, "float64", "int8", None, object())
DTYPE_NAMES = ("foo", "bf16", "float64", 3, object(), jnp.int32)
PATHS = (None, 3, "", "a\0b", "no-such-folder", b"a")
WRONG = {
    generate: GENERATE,
    stream: GENERATE,
    forward: {
        "model": MODELS,
        "tokens": PROMPTS,
        "lengths": LENGTH,
        "sparsity": SPARSITIES,
        "taps": (3, "a", TapSpec, True),
    },
    prefill: {"model": MODELS, "tokens": PROMPTS, "lengths": LENGTH, "cache": JUNK},
    decode_step: {
        "model": MODELS,
        "token": (RAGGED, None, "a", 3, [1.5, 1.5, 1.5], [1], [[1], [2], [3]]),
        "cache": JUNK,
        "sparsity": SPARSITIES,
        "live": (3, "a", [True], [1, 0, 1]),
        "implementation": IMPLEMENTATIONS,
    },
    init_cache: {
        "config": (None, *JUNK),
        "batch_size": NOT_SIZES,
        "capacity": NOT_SIZES,
        "dtype": (jnp.int32, *DTYPE[:3], object()),
    },
    perplexity: SCORE | {"sparsity": SPARSITIES},
    complete: {
        "prompts": (None, 3, "", [], [3], {"a": 1}, np.array(2), object()),
        "max_new_tokens": tuple(each for each in NOT_SIZES if each is not None),
        "batch_size": tuple(each for each in NOT_COUNTS if each is not None),
        "stop_strings": NO_TEXTS,
        "stop_ids": GENERATE["stop_ids"],
        "key": GENERATE["key"],
        "sparsity": (*SPARSITIES, "x"),
    },
    submit: {
        "prompt": (None, 3, [], [[1]], [1.5], [-1], object()),
        "max_new_tokens": tuple(each for each in NOT_SIZES if each is not None),
        "stop_strings": NO_TEXTS,
        "stop_ids": GENERATE["stop_ids"],
        "logprobs": (-1, 2.5, True, "a", 10**30, [1]),
        "seed": (2.5, "a", True, None, 10**30, jax.random.key(0)),
    },
    sweep: {
        "model": (None, *JUNK),
        "windows": PROMPTS,
        "selectors": (*NO_LIST, None, ["x"], {"x": 3}),
        "protocols": (*NO_LIST, None, ["x"], []),
        "densities": (*NO_LIST, [2], ["a"], []),
        "batch_sizes": (*NO_LIST, [2.5], [0], [99], [10**30]),
        "dense_layers": (*NO_LIST, [2], [-1], [0.5]),
        "context": (-1, 99, 2.5, "a", None, 10**30),
        "neurons": (3, "x", None),
        "seed": (2.5, "a", 10**30),
        "greedy": (3, evaluation.GreedyOptions(prompts=0), evaluation.GreedyOptions(new_tokens=10**30)),
    },
    agreement: SCORE | {"selected": SPARSITIES},
    decode_bytes: COUNTED | {"dtype": DTYPE[:3], "mean_outputs": (None, 3, "x"), "router_width": (-1, 0.5)},
    decode_flops: COUNTED | {"mean_outputs": (None, 3, "x"), "router_width": (-1, 0.5)},
    largest_batch: {
        "config": (None, *JUNK),
        "memory": (None, "a", float("nan")),
        "cache_length": NOT_COUNTS,
        "dtype": DTYPE[:3],
    },
    pj.costs.weights_bytes: {"config": (None, *JUNK)},
    pj.costs.cache_bytes_per_token: {"config": (None, *JUNK)},
    collect: {
        "model": MODELS,
        "windows": PROMPTS,
        "out_dir": (None, 3, ""),
        "held_out": (None, 3, "ab", (0.5,), (0.5, 0.5), (-0.1, 0.1), ("a", "b"), (float("nan"), 0)),
        "max_bytes": (None, "a", float("nan"), 0),
        "fit": (None, "a", 3),
        "overwrite": (None, "a", 3),
        "batch_size": NOT_COUNTS,
    },
    sparsify: {
        "model": MODELS,
        "windows": PROMPTS,
        "key": (None, "a", 2.5),
        "head_density": ("x", 0, 1.5, None, float("nan")),
        "collecting": JUNK,
        "training": JUNK,
        "calibration": JUNK,
    },
    pj.load: {"path": PATHS, "dtype": ("float64", 3)},
    save: {"path": PATHS[:3], "bundle": (None, *JUNK, MODEL), "overwrite": (None, "no", 0)},
    convert: {
        "src": PATHS,
        "out": (None, 3, ""),
        "revision": (3, b"main", object()),
        "dtype": DTYPE_NAMES,
        "overwrite": (None, "no", 0),
        "allow_nonfinite": (None, "no", 1),
    },
    describe: {"src": PATHS, "revision": (3, object()), "dtype": DTYPE_NAMES},
    export: {"src": PATHS, "out": (None, 3, ""), "shard_bytes": NOT_COUNTS, "overwrite": (None, "no", 0)},
    pj.Categorical: {
        "temperature": (0, -1, "a", None, float("nan"), [], [0.0]),
        "top_k": (0, 2.5, "a", True),
        "top_p": (0, 2, "a", float("nan")),
    },
    pj.GenerationSettings: {"stop_ids": ((-1,), ("a",)), "max_new_tokens": (0, 2.5, "a")},
    CollectOptions: {"batch_size": NOT_COUNTS, "importance": (None, 3, "x", [])},
    TrainOptions: {
        "max_epochs": NOT_COUNTS,
        "rank": NOT_COUNTS[:5],
        "learning_rate": (0, None, "a", float("nan"), float("inf")),
        "group_objective": (None, 3, "x"),
    },
    CalibrateOptions: {
        "batch_sizes": (*NO_LIST, None, (), (2, 1), (0,), ("a",), (1.5,), {1, 2}),
        "target_recall": (0, 2, "a", None, float("nan")),
        "multiple": NOT_COUNTS,
        "dense_attention": (None, 3, "x"),
    },
}
CASES = [
    pytest.param(function, name, values, id=f"{names(function)}-{name}")
    for function, given in WRONG.items()
    for name, values in given.items()
]


@pytest.mark.parametrize(("function", "name", "values"), CASES)
def test_wrong_arguments_are_one_line(function, name, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "dtype" and function is pj.load:
        function = functools.partial(function, tmp_path)
    for value in values:
        one_line(function, **{name: value})
    assert not list(tmp_path.iterdir())  # nothing is written


@pytest.mark.parametrize("batch_size", NOT_COUNTS, ids=names)
def test_no_plan_for_such_a_batch(batch_size):
    one_line(TABLE.for_batch, batch_size, CONFIG)
    one_line(pj.Bundle(MODEL, routers=zoo.routers("opt"), plans=TABLE).sparsity, batch_size)


def test_no_plan_of_such_a_density():
    bundle = pj.Bundle(MODEL, routers=zoo.routers("opt"), plans=TABLE)
    for density in ("x", 0, 2, float("nan")):
        one_line(bundle.sparsity, 1, density)
    one_line(TABLE.for_batch, 1, None)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(pj.ModelConfig)])
def test_configs_of_wrong_types(field):
    for value in ("a", 2.5, (1,), object()):
        if not (field in ("norm_eps", "activation_threshold") and isinstance(value, float)):
            one_line(dataclasses.replace, CONFIG, **{field: value})


ROPE = pj.RopeConfig(scaling="llama3", factor=2.0, original_max_positions=8)


@pytest.mark.parametrize("config", [CONFIG, ROPE], ids=lambda each: type(each).__name__)
def test_configs_of_scalars(config):
    """NumPy's and JAX's are what they hold, so the config is as static as with Python's."""
    for name, value in vars(config).items():
        made = [np.array(value), np.array(value)[()]] if isinstance(value, int | float | str) else []
        made += [jnp.array(value)] if isinstance(value, bool | int) else []
        for each in made:
            same = dataclasses.replace(config, **{name: each})
            assert same == config and hash(same) == hash(config) and type(vars(same)[name]) is type(value)
    assert pj.RopeConfig(theta=np.float32(2)).theta == 2.0  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("field", ["batch_sizes", "dense_layers", "neurons", "recall"])
def test_plan_tables_of_wrong_types(field):
    for value in (*NO_LIST[1:], None, (3, 3), [(1,), 3]):
        one_line(dataclasses.replace, TABLE, **{field: value})


def test_plan_tables_of_other_sequences():
    given = {"batch_sizes": np.array([1, 2]), "dense_layers": [np.int64(0)], "num_layers": np.int64(2)}
    made = dataclasses.replace(TABLE, neurons=[[8, 8], (16, None)], recall=np.ones((2, 2)), **given)
    assert made == TABLE and hash(made) == hash(TABLE)


def test_batch_sizes_of_prompts():
    made = [complete(batch_size=kind(2)) for kind in (int, np.int64, np.array, jnp.array)]
    assert all(each == made[0] for each in made) and len(made[0]) == 3


@pytest.mark.parametrize("part", ["model", "tokenizer", "routers", "plans"])
def test_bundles_of_wrong_parts(part):
    for value in JUNK:
        one_line(pj.Bundle, **{"model": MODEL} | {part: value})


def test_learning_from_the_wrong_things():
    for wrong in (None, *JUNK, MODEL):
        one_line(sparsity.train_routers, wrong, CONFIG, 0)
        one_line(sparsity.calibrate, wrong, SPARSE.routers, CONFIG, key=0)


def test_streams_of_text_need_tokens_and_a_tokenizer():
    for wrong in (None, *JUNK):
        one_line(pj.TextStream, wrong, None)
        one_line(pj.TextStream, stream(), wrong)


def test_streams_are_refused_inside_jit():
    one_line(jax.jit(lambda tokens: [each.tokens for each in stream(tokens=tokens)]), TOKENS)
    for value in ({"repetition_penalty": 1.5}, {"stop_ids": jnp.array([3])}, {"seed": 3}):
        one_line(jax.jit(lambda given: submit(**given)), value)
    submit()
    one_line(jax.jit(lambda _: list(engine())), 0)
    engine.cache_clear()  # this one is closed now


@pytest.fixture(scope="module")
def expected():
    return np.asarray(generate().tokens)


@pytest.mark.parametrize(
    "given",
    [
        {"tokens": TOKENS.tolist(), "lengths": LENGTHS.tolist()},
        {"tokens": np.asarray(TOKENS, np.int64), "lengths": np.asarray(LENGTHS, np.uint8)},
        {"stop_ids": None},
        {"stop_ids": np.array([], np.int32)},
        {"max_new_tokens": np.int64(2), "num_return_sequences": np.int32(1)},
        {"repetition_penalty": np.float32(1)},
        {"key": 3},
        {"key": np.zeros(2, np.uint32)},
        {"implementation": "xla"},
    ],
    ids=names,
)
def test_arguments_as_people_give_them(given, expected):
    np.testing.assert_array_equal(generate(**given).tokens, expected)


def test_lists_are_prompts_of_the_model_functions():
    given = {"tokens": TOKENS.tolist(), "lengths": LENGTHS.tolist()}
    (logits, _), (whole, _) = zoo.jit(lambda: (prefill(**given), forward(**given)))()
    last = whole[np.arange(3), np.asarray(LENGTHS) - 1]
    np.testing.assert_allclose(logits, last, rtol=1e-4, atol=1e-4)
    assert zoo.jit(lambda: decode_step(token=[1, 2, 3], live=[True, False, True]))()[0].shape == (
        3,
        zoo.VOCAB,
    )


@pytest.mark.parametrize(
    "kind", [list, np.array, jnp.array, lambda counts: tuple(map(np.int64, counts))], ids=names
)
def test_plans_of_other_sequences(kind):
    made = pj.SparsityPlan(kind([20, 20]), kind([2, 2]))
    assert made == PLAN and hash(made) == hash(PLAN)
    assert CalibrateOptions(batch_sizes=kind([1, 2])).batch_sizes == (1, 2)


@pytest.mark.parametrize("temperature", [[0.5, 1.0, 2.0], np.float32(0.5), jnp.ones(3)], ids=names)
def test_temperatures_of_rows(temperature):
    made = generate(key=jax.random.key(0), sampler=pj.Categorical(temperature=temperature))
    assert made.tokens.shape == (3, 2)


def test_comparing_never_raises():
    taps = zoo.forward(MODEL, TOKENS, LENGTHS)[1]
    made = Generation(TOKENS, LENGTHS, LENGTHS > 0, LENGTHS < 0)
    for each in (zoo.routers("opt"), SPARSE, zoo.empty_cache(MODEL, 3), made, taps, PLAN, TABLE, CONFIG):
        leaves, tree = jax.tree.flatten(each)
        twin = jax.tree.unflatten(tree, leaves)
        assert each == each and isinstance(each == twin, bool) and each != 3
