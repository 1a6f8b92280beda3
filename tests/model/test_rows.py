"""A row of a batch is computed as if it were alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from tests.model import zoo
from tests.tolerances import assert_close

NAN = float("nan")
SPARSE = ("opt", "fatrelu-gated", "qk-norm")


def _pairs():
    """Two batches that share only row 1, and the length of that row."""
    tokens, lengths = zoo.batch()
    others, _ = zoo.batch(seed=1)
    keep = np.array([False, True, False])
    return (tokens, lengths), (
        jnp.where(keep[:, None], tokens, others),
        jnp.where(keep, lengths, jnp.array([2, 0, 7], jnp.int32)),
    )


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_other_rows_have_no_influence(name):
    """Bit for bit, in forward, prefill and decode_step; even if the others' activations are NaN."""
    model, batches, seen = zoo.model(name), _pairs(), []
    own = set(np.asarray(batches[0][0])[1].tolist())
    stranger = min(set(range(zoo.VOCAB)) - own)
    poisoned = zoo.with_rows(model, "embed.tokens", stranger, NAN)
    batches += ((batches[1][0].at[jnp.array([0, 2])].set(stranger), batches[1][1]),)
    reach = np.arange(zoo.VOCAB) != stranger
    for decoder, (tokens, lengths) in zip((model, model, poisoned), batches, strict=True):
        length = int(lengths[1])
        forward, _ = zoo.forward(decoder, tokens, lengths)
        read, cache = zoo.prefill(decoder, tokens, lengths, zoo.empty_cache(model, 3))
        step, cache = zoo.decode_step(decoder, tokens[:, 0], cache)
        rows = (np.asarray(forward)[1, :length], np.asarray(read)[1], np.asarray(step)[1])
        seen.append([row[..., reach] for row in rows])
    for variant in seen[1:]:
        for row, expected in zip(variant, seen[0], strict=True):
            assert np.isfinite(row).all()
            assert (row == expected).all()


@pytest.mark.parametrize("name", ["opt", "window"])
def test_a_row_alone_equals_itself_in_a_batch(name):
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    read, cache = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3))
    step, _ = zoo.decode_step(model, tokens[:, 0], cache)
    for row in range(3):
        one = slice(row, row + 1)
        alone, cache = zoo.prefill(model, tokens[one], lengths[one], zoo.empty_cache(model, 1))
        assert_close(alone[0], read[row], "rounding")
        assert_close(zoo.decode_step(model, tokens[one, 0], cache)[0][0], step[row], "rounding")


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_rows_are_independent_when_the_neurons_are_fixed(name):
    """Neurons are chosen for the whole batch, so they are held fixed here."""
    model, seen = zoo.model(name), []
    for tokens, lengths in _pairs():
        _, cache = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3))
        seen.append(np.asarray(zoo.decode_step(model, tokens[:, 0], cache, sparsity=zoo.per_row(name))[0])[1])
    assert (seen[0] == seen[1]).all()


@pytest.mark.parametrize("name", SPARSE)
def test_ended_rows_have_no_say(name):
    """Whatever they hold, even NaN, the neurons are those that the live rows want, and those rows' logits stay."""
    model = zoo.model(name)
    sparsity = pj.Sparsity(zoo.routers(name), zoo.half(model.config))
    step = zoo.jit(functools.partial(pj.decode_step, sparsity=sparsity))
    live, seen = jnp.array([False, True, False]), []
    for tokens, lengths in _pairs():
        _, cache = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3))
        spoilt = jax.tree.map(lambda x: jnp.where(live[:, None, None, None], x, jnp.nan), (cache.k, cache.v))
        caches = (cache, pj.KVCache(*spoilt, cache.length))
        seen += [np.asarray(step(model, tokens[:, 0], each, live=live)[0]) for each in caches]
    assert all((logits[1] == seen[0][1]).all() for logits in seen)
    assert np.isfinite(seen).all(), "rows that are not live read nothing"


@pytest.mark.parametrize(("name", "sparse"), [("opt", True), ("llama-gqa", False)])
def test_a_ragged_batch_generates_what_each_prompt_does_alone(name, sparse):
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    plan = pj.SparsityPlan((None,) * model.config.num_layers, zoo.half(model.config).groups)
    sparsity = pj.Sparsity(zoo.routers(name), plan) if sparse else None
    settings = {"max_new_tokens": 10, "stop_ids": (7, 11), "sparsity": sparsity}
    together = pj.generate(model, tokens, lengths, **settings)
    for row in range(3):
        length = int(lengths[row])
        alone = pj.generate(model, tokens[row : row + 1, :length], lengths[row : row + 1], **settings)
        assert (np.asarray(alone.tokens[0]) == together.tokens[row]).all()
        assert (int(alone.lengths[0]), bool(alone.stopped[0])) == (
            int(together.lengths[row]),
            bool(together.stopped[row]),
        )
