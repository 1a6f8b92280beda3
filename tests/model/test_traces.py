"""How often programs are traced and compiled, and that the cache is written in place."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.model.parameters import parameters
from tests.model import zoo

MODEL = "llama-gqa"
SPARSITIES = {"dense": None, "sparse": pj.Sparsity(zoo.routers(MODEL), zoo.half(zoo.CONFIGS[MODEL]))}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the programs that XLA compiles inside the block."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **about) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(str(about.get("fun_name", "unnamed")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def prompts(rows: int, width: int, lengths: list[int], seed: int = 0):
    tokens = np.random.default_rng(seed).integers(0, zoo.VOCAB, (rows, width)).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(np.array(lengths, np.int32))


@pytest.mark.parametrize("kind", SPARSITIES)
def test_one_compilation_for_all_prompts_of_a_bucket(kind):
    model, sparsity = zoo.model(MODEL), SPARSITIES[kind]
    write = lambda *batch: pj.generate(*batch, max_new_tokens=11, sparsity=sparsity, stop_ids=(5,))
    jax.block_until_ready(write(model, *prompts(2, 9, [9, 1])))
    others = [prompts(2, *shape) for shape in ((9, [2, 8]), (10, [3, 10]), (1, [1, 1]), (16, [16, 5]))]
    with compilations() as names:
        for batch in others:
            jax.block_until_ready(write(model, *batch))
    assert names == []
    if kind == "dense":
        with compilations() as names:
            jax.block_until_ready(write(model, *prompts(2, 17, [17, 4])))
        assert names, "another bucket is another program, so the listener must have heard it"


def test_new_weights_of_the_same_shapes_reuse_the_program():
    model, sparsity = zoo.model(MODEL), SPARSITIES["sparse"]
    assert sparsity is not None
    batch = prompts(2, 9, [9, 1])
    pj.generate(model, *batch, max_new_tokens=11, sparsity=sparsity)
    changed = zoo.with_parameter(model, "embed.tokens", 2 * parameters(model)["embed.tokens"])
    other = pj.Sparsity(jax.tree.map(jnp.negative, sparsity.routers), sparsity.plan)
    with compilations() as names:
        pj.generate(changed, *batch, max_new_tokens=11, sparsity=other)
    assert names == []


@pytest.mark.parametrize("kind", SPARSITIES)
def test_a_decoding_step_is_traced_once_for_all_lengths(kind):
    model, traces = zoo.model(MODEL), []

    @zoo.jit
    def step(model, token, cache, sparsity):
        traces.append(token.shape)
        return pj.decode_step(model, token, cache, sparsity=sparsity)

    tokens, _ = zoo.batch(rows=2)
    cache = zoo.empty_cache(model, 2)
    for position in range(4):
        _, cache = step(model, tokens[:, position], cache, SPARSITIES[kind])
    assert traces == [(2,)]
    assert cache.length.tolist() == [4, 4]


@pytest.mark.parametrize("kind", SPARSITIES)
def test_a_donated_cache_is_written_in_place(kind):
    model, cache = zoo.model(MODEL), zoo.empty_cache(zoo.model(MODEL), 2)
    token = jnp.zeros((2,), jnp.int32)
    step = jax.jit(pj.decode_step, donate_argnames="cache")
    compiled = step.lower(model, token, cache, sparsity=SPARSITIES[kind]).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in (*cache.k, *cache.v))
    _, after = compiled(model, token, cache, sparsity=SPARSITIES[kind])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    assert after.length.tolist() == [1, 1]


def test_other_numbers_compile_nothing():
    """A sweep over settings, and the transfers that it needs are explicit ones."""
    model, batch, key = zoo.model(MODEL), prompts(2, 9, [9, 1]), jax.random.key(0)

    def write(temperature, top_k, top_p, new, stop_ids, penalty):
        sampler = pj.Categorical(temperature, top_k=top_k, top_p=top_p)
        settings = {"max_new_tokens": new, "stop_ids": stop_ids, "repetition_penalty": penalty}
        return pj.generate(model, *batch, key, sampler=sampler, **settings)

    jax.block_until_ready(write(0.7, 5, None, 9, (1,), 1.0))
    others = ((0.9, 7, 0.5, 12, None, 1.2), (1.3, None, 1.0, 5, 3, 1.0), (0.2, 1, None, 14, [4, 5], 2))
    with compilations() as names, jax.transfer_guard("disallow"):
        for settings in others:
            assert write(*settings).tokens.shape == (2, settings[3])
    assert names == []
