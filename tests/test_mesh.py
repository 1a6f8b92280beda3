"""The same tokens on one device as on several, for the same plan; run in a process with eight devices."""

import contextlib
import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import polarjax as pj
from pallas_kernels import Link
from pallas_kernels.all_reduce_norm.reference import reference
from polarjax import evaluation
from polarjax import sparsity as learning
from polarjax.engine import programs
from polarjax.evaluation import perplexity
from polarjax.evaluation.continuations import score_continuations
from polarjax.evaluation.sweep_cases import Asked
from polarjax.model import joining
from polarjax.model.parameters import parameters, with_parameters
from tests.model import zoo
from tests.several_devices import printed
from tests.tolerances import assert_close

DEVICES = 8
LAYOUTS: dict[str, tuple[int, int, Any, tuple[str, ...]]] = {  # data, model, attention, explicit axes
    "groups": (1, 2, "groups", ()),
    "groups of two batches": (2, 2, "groups", ("data", "model")),
    "sequences": (2, 2, "sequences", ()),
    "sequences, explicit": (1, 2, "sequences", ("model",)),
}
CASES = [
    ("opt-350m", "groups of two batches"),
    ("fatrelu-gated", "sequences"),
    ("qk-norm", "sequences, explicit"),
    ("window", "groups of two batches"),
]


def mesh_of(kind: str) -> jax.sharding.Mesh:
    data, model, _, explicit = LAYOUTS[kind]
    axes = ("data", "model")
    types = tuple(AxisType.Explicit if axis in explicit else AxisType.Auto for axis in axes)
    return jax.make_mesh((data, model), axes, axis_types=types)


def around(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Explicit axes are kept where the caller has set the mesh."""
    return jax.set_mesh(mesh_of(kind)) if LAYOUTS[kind][3] else contextlib.nullcontext()


def divisible(name: str) -> pj.Decoder:
    """The model without its last token, so that two devices divide the vocabulary."""
    flat, V = parameters(zoo.model(name)), zoo.VOCAB
    flat = {path: value[: V - 1] if value.shape[0] == V else value for path, value in flat.items()}
    return with_parameters(dataclasses.replace(zoo.CONFIGS[name], vocab_size=V - 1), flat)


def bundle_of(name: str, kind: str) -> pj.Bundle:
    """Half of all neurons and groups, for so many shards; groups aren't in the order of the devices."""
    (_, model, attention, _), config = LAYOUTS[kind], zoo.CONFIGS[name]
    L, K, by_groups = config.num_layers, config.num_kv_heads, model if attention == "groups" else 1
    order = tuple(tuple(np.random.default_rng(i).permutation(K).tolist()) for i in range(L))
    plans = pj.PlanTable(
        *(L, config.d_ff, K, (4,), ((20,) * L,), ((0.9,) * L,)),
        neuron_shards=model,
        group_shards=by_groups,
        order=order if by_groups > 1 else (),
    )
    return pj.Bundle(divisible(name), routers=zoo.routers(name), plans=plans)


def steps(model: pj.Decoder, tokens, lengths, sparsity: pj.Sparsity, live) -> list[jax.Array]:
    """Logits after the prompts and after one more token in the `live` rows."""
    first, cache = pj.prefill(model, tokens, lengths, zoo.empty_cache(model, tokens.shape[0]))
    token = lengths % 60
    return [first, pj.decode_step(model, token, cache, sparsity=sparsity, live=live)[0]]


def logits_of(bundle: pj.Bundle, batch_shards: int) -> list[np.ndarray]:
    """Logits of a prompt and of a sparse step with a row that isn't live."""
    live = np.array([True, True, False, True])
    made = zoo.jit(steps)(bundle.model, *zoo.batch(4), for_parts(bundle, batch_shards), live)
    return [each[live] for each in jax.device_get(made)]


def for_parts(bundle: pj.Bundle, batch_shards: int) -> pj.Sparsity:
    """What the bundle skips for four sequences in so many parts."""
    sparsity = bundle.sparsity(4)
    return dataclasses.replace(sparsity, plan=dataclasses.replace(sparsity.plan, batch_shards=batch_shards))


def tokens_of(bundle: pj.Bundle, batch_shards: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What random generation makes, the likeliest tokens and what a greedy stream makes; and log-probabilities, of more
    tokens than a device has."""
    prompts, options = zoo.batch(4), {"max_new_tokens": 6, "sparsity": for_parts(bundle, batch_shards)}
    sampler = pj.Categorical(0.9, top_k=20, top_p=0.9)
    drawn = {"sampler": sampler, "logprobs": 40, "repetition_penalty": 1.2} | options
    made = pj.generate(bundle.model, *prompts, jax.random.key(1), **drawn)
    pieces = list(pj.stream(bundle.model, *prompts, **options))
    found = made.logprobs
    assert found is not None
    tokens = [made.tokens, found.ids, np.concatenate([each.tokens for each in pieces], 1)]
    return [*map(np.asarray, tokens)], [np.asarray(found.chosen), np.asarray(found.best)]


def engine_tokens(bundle: pj.Bundle) -> dict[int, list[int]]:
    """What an engine makes of prompts that are read in one piece and in several, next to each other, and of some that
    begin as one in another slot does."""
    random, made = np.random.default_rng(0), {}
    start = random.integers(0, 60, 34).tolist()
    prompts = [random.integers(0, 60, length).tolist() for length in (3, 20, 9, 5, 12)]
    with pj.Engine(bundle, slots=4, capacity=48, read_tokens=8) as engine:
        for prompt in (start, *prompts, *([*start, i] for i in range(3))):
            engine.submit(prompt, max_new_tokens=5, stop_ids=())
        for event in engine:
            made.setdefault(event.request, []).extend(event.tokens)
    return made


def exchanges_of_reading(bundle: pj.Bundle) -> list[str]:
    """Kinds of what devices exchange when prompts are read, besides sums."""
    with pj.Engine(bundle, slots=4, capacity=48, read_tokens=8) as engine:
        reading = engine._packer.reading([], next(iter(engine._packer.shapes)))
        program = programs.read.lower(engine._model, engine._slots, reading).compile().as_text()
    found = re.findall(r"= \S+ (all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    return sorted(found)


def sweep_faults(bundle: pj.Bundle) -> dict[str, str]:
    """What is wrong with the cases that a sweep on two batches decides on before it measures anything."""
    given = dict.fromkeys(field.name for field in dataclasses.fields(Asked))
    given |= {"densities": (None,), "selectors": ("router",), "protocols": ("masked", "decode"), "context": 1}
    given |= {"neurons": "plan", "seed": 0}
    asked = lambda **more: Asked(**given | more).chosen(bundle, (8, 6)).cases  # pyright: ignore[reportArgumentType]
    shards = [case.plan.batch_shards for case in asked(batch_sizes=(4,))]
    faults = {} if shards == [1, 2] else {"sweep": str(shards)}
    try:
        asked(batch_sizes=(3,))
        faults["sweep of 3"] = "not refused"
    except pj.PolarjaxError as error:
        if "batch_sizes: the sequences can't be divided evenly" not in str(error):
            faults["sweep of 3"] = str(error)
    return faults


def on_mesh() -> None:
    """Runs in a process with eight devices; prints what differs from one device."""
    faults = {}
    zoo.batch(4)  # kept, and so made outside of a mesh
    for name, kind in CASES:
        one = bundle_of(name, kind)
        with around(kind):
            several = logits_of(pj.shard(one, mesh_of(kind), attention=LAYOUTS[kind][2]), LAYOUTS[kind][0])
        pairs = zip(logits_of(one, LAYOUTS[kind][0]), several, strict=True)
        try:
            for expected, actual in pairs:
                assert_close(actual, expected, "rounding")
        except AssertionError as error:
            faults[f"{name}, {kind}"] = str(error)
    one = bundle_of("opt", "groups of two batches")
    lone = pj.shard(
        one, jax.make_mesh((2, 1), ("data", "model"))
    )  # each device has all that the plans divide
    if not all(map(np.array_equal, tokens_of(one, 2)[0], tokens_of(lone, 2)[0])):
        faults["plans of more shards"] = "other tokens"
    several = pj.shard(one, mesh_of("groups of two batches"))
    (tokens, expected), (spread, found) = tokens_of(one, 2), tokens_of(several, 2)
    if not all(map(np.array_equal, tokens, spread)):
        faults["generate"] = "other tokens"
    for pair in zip(found, expected, strict=True):
        assert_close(*pair, "rounding")
    faults |= sweep_faults(several)
    one = bundle_of("opt", "sequences")
    expected, several = engine_tokens(one), pj.shard(one, mesh_of("sequences"))
    with around("groups of two batches"):  # whatever mesh is set
        if engine_tokens(several) != expected:
            faults["engine"] = "other tokens"
    found = exchanges_of_reading(pj.shard(pj.Bundle(one.model), mesh_of("groups of two batches")))
    # Of the pieces' last states, and of each half of the vocabulary the likeliest tokens and their numbers.
    if found != ["all-gather"] * 7:
        faults["reading"] = str(found)
    model, (tokens, lengths) = divisible("opt"), zoo.batch(4)
    usual = pj.shard(model, jax.make_mesh((2, 2), ("data", "model")))  # explicit axes, which nobody has set
    losses = [perplexity(each, np.asarray(tokens)).nll for each in (model, usual)]
    with around("groups of two batches"):
        losses += [perplexity(pj.shard(model, usual.layout.mesh), np.asarray(tokens)).nll]
        losses += [perplexity(usual, np.asarray(tokens), mode="decode").nll]
        first = np.asarray(pj.forward(usual, tokens, lengths)[0])[0]
    assert_close(np.float32(losses[1:]), np.float32(losses[:1] * 3), "rounding")
    far = jax.jit(pj.forward)(pj.shard(model, mesh_of("groups")), tokens, lengths)[0]
    if far.sharding.spec[-1] != "model":
        faults["forward"] = str(far.sharding)
    for each in (far[0], first):
        assert_close(each, zoo.jit(pj.forward)(model, tokens, lengths)[0][0], "rounding")
    print(json.dumps(faults | kernel_faults() | refusals()))


def kernel_faults() -> dict[str, str]:
    """Steps of bfloat16 models whose sums the kernel would make, replaced by its oracle: other logits, or other sums."""
    numbers, parts, faults = [], [], {}

    def summed(update, x, scale, link, number, **more):
        numbers.append(number)
        parts.append(update.ndim == 3)
        update = update.sum(0).astype(x.dtype) if update.ndim == 3 else update
        return reference(jax.lax.psum(update, "model")[None], x, scale, **more)

    for name in ("opt", "llama-mha"):
        flat = {path: value.astype(jnp.bfloat16) for path, value in parameters(divisible(name)).items()}
        config = dataclasses.replace(zoo.CONFIGS[name], vocab_size=zoo.VOCAB - 1)
        model = pj.shard(with_parameters(config, flat), mesh_of("groups of two batches"))
        run = lambda model=model: np.asarray(jax.jit(dense_step)(model, *zoo.batch(4)))
        expected = run()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(joining, "all_reduce_norm", summed)
            patch.setattr(joining.Joining, "summands", lambda _, axis, *more: 2 * (axis == "neurons"))
            patch.setattr(joining, "linked", lambda *_: Link(jnp.zeros((1,)), jnp.zeros((3, 2))))
            jax.clear_caches()
            found = run()
        if numbers != list(range(1, 2 * config.num_layers + 1)):
            faults[name] = f"sums {numbers}"
        if parts != [False, True] * config.num_layers:
            faults[f"{name}, parts"] = str(parts)
        numbers.clear(), parts.clear()
        assert_close(found, expected, "rounding", jnp.bfloat16)
    return faults


def dense_step(model: pj.Decoder, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits of one step after a prompt."""
    sizes = {"batch_size": tokens.shape[0], "capacity": tokens.shape[1] + 1}
    cache = pj.init_cache(model.config, dtype=model.dtype, **sizes)
    _, cache = pj.prefill(model, tokens, lengths, cache)
    return pj.decode_step(model, tokens[:, 0], cache)[0]


def within(mesh, run):
    """Runs a function while a mesh is set."""
    with jax.set_mesh(mesh):
        return run()


def refusals() -> dict[str, str]:
    """Bad input that isn't refused by one line with these words."""
    model, mesh = divisible("opt"), mesh_of("groups")
    plan, prompts = zoo.half(model.config), zoo.batch(4)
    sparsity = pj.Sparsity(zoo.routers("opt"), plan)
    spread = pj.shard(model, mesh_of("sequences"))
    other = jax.sharding.Mesh(np.reshape(jax.devices()[4:], (2, 2)), spread.layout.mesh.axis_names)
    twice = jax.sharding.Mesh(np.reshape(jax.devices()[:1] * 2, (1, 2)), ("data", "model"))
    everywhere = functools.partial(jax.shard_map, mesh=spread.layout.mesh, in_specs=(), out_specs=())
    config = model.config
    plans = pj.PlanTable(
        num_layers=config.num_layers,
        num_neurons=config.d_ff,
        num_groups=config.num_kv_heads,
        batch_sizes=(4,),
        neurons=(plan.neurons,),
        recall=((1.0,) * config.num_layers,),
        head_density=0.5,
    )
    skipping = pj.Bundle(pj.shard(model, mesh), routers=zoo.routers("opt"), plans=plans)
    alone = jax.device_put(model, jax.devices()[0])
    decode = lambda model, prompts=prompts, **more: pj.generate(model, *prompts, max_new_tokens=2, **more)
    wrong = {
        "no axis model": lambda: pj.shard(model, jax.make_mesh((2,), ("data",))),
        "an axis 'tensor'": lambda: pj.shard(model, jax.make_mesh((2,), ("tensor",))),
        "4 KV heads (groups) can't be divided": lambda: pj.shard(model, jax.make_mesh((8,), ("model",))),
        "61 vocabulary entries can't": lambda: pj.shard(zoo.model("opt"), mesh),
        "not a mesh of devices": lambda: pj.shard(model, 2),
        "a device is in the mesh twice": lambda: pj.shard(model, twice),
        "no axis 'vocabulary'": lambda: pj.shard(model, mesh, rules={"vocabulary": None}),
        "'embed' can't be divided": lambda: pj.shard(model, mesh, rules={"embed": "model"}),
        "another number of shards": lambda: decode(pj.shard(model, mesh), sparsity=sparsity),
        "another number of shards; got neurons in 1": lambda: pj.Engine(skipping, slots=4, capacity=16),
        "can't be divided evenly": lambda: decode(spread, zoo.batch(3)),
        "inside of jax.shard_map": lambda: everywhere(lambda: decode(spread))(),
        "got data=1, model=2, expected data=2": lambda: within(mesh, lambda: decode(spread)),
        "one of other devices": lambda: within(other, lambda: decode(spread)),
    }
    windows = np.asarray(prompts[0])
    on_one = (
        lambda: decode(alone),
        lambda: pj.forward(alone, *prompts),
        lambda: perplexity(alone, windows),
        lambda: evaluation.agreement(alone, windows, sparsity),
        lambda: list(score_continuations(alone, [((1,), (2,))])),
        lambda: evaluation.sweep(pj.Bundle(alone, routers=sparsity.routers, plans=plans), windows),
        lambda: learning.collect(alone, windows, "never-made"),
    )
    several = "jax.set_mesh has set several; got a mesh of 2"
    within_mesh = [(several, functools.partial(within, mesh, run)) for run in on_one]
    found = {}
    for words, run in (*wrong.items(), *within_mesh):
        try:
            run()
            found[words] = "not refused"
        except pj.PolarjaxError as error:
            if words not in str(error) or "\n" in str(error):
                found[words] = str(error)
    return found


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="devices are simulated on CPUs")
def test_tokens_are_the_same_on_several_devices():
    text = printed("from tests import test_mesh; test_mesh.on_mesh()", DEVICES)
    assert json.loads(text.splitlines()[-1]) == {}
