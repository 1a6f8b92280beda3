"""NaN in everything that must not be read leaves the results as they were, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.selection.selectors import top_mask
from tests.model import zoo

NAN = float("nan")
SPARSE = ("opt", "opt-350m", "fatrelu-gated", "qk-norm", "window")


def _filled(name: str):
    """A model and a cache with ragged prompts in it."""
    model, (tokens, lengths) = zoo.model(name), zoo.batch()
    _, cache = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3))
    return model, tokens[:, 0], cache


def _poison_cache(cache: pj.KVCache, where: list[np.ndarray]) -> pj.KVCache:
    """NaN in keys and values where the layer's mask [B K S] is set."""
    spoil = lambda array, mask: jnp.where(jnp.asarray(mask)[..., None], NAN, array)
    k = tuple(spoil(array, mask) for array, mask in zip(cache.k, where, strict=True))
    v = tuple(spoil(array, mask) for array, mask in zip(cache.v, where, strict=True))
    return pj.KVCache(k, v, cache.length)


def _unread(cache: pj.KVCache, config: pj.ModelConfig) -> list[np.ndarray]:
    """For each layer [B K S]: positions past the length, or before the window of the coming token."""
    position, length = np.arange(cache.capacity)[None], np.asarray(cache.length)[:, None]
    masks = []
    for layer in range(config.num_layers):
        window = config.window(layer) or cache.capacity
        unread = (position >= length) | (position < length + 1 - window)
        masks.append(np.broadcast_to(unread[:, None], cache.k[layer].shape[:3]))
    return masks


def _same(result, expected):
    logits, cache = result
    assert np.isfinite(logits).all()
    assert (np.asarray(logits) == expected[0]).all()
    assert (np.asarray(cache.length) == expected[1].length).all()


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_dense_decoding_reads_no_cache_beyond_length_or_window(name):
    model, token, cache = _filled(name)
    expected = zoo.decode_step(model, token, cache)
    _same(zoo.decode_step(model, token, _poison_cache(cache, _unread(cache, model.config))), expected)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_decoding_reads_selected_groups_and_neurons_only(name):
    model, token, cache = _filled(name)
    config, sparsity = model.config, zoo.per_row(name)
    expected = zoo.decode_step(model, token, cache, sparsity=sparsity)
    kept = [
        np.asarray(top_mask(sparsity.routers.groups[layer], sparsity.plan.groups[layer]))
        for layer in range(config.num_layers)
    ]
    assert any((mask[0] != mask[1]).any() for mask in kept)  # the rows choose for themselves
    where = [unread | ~mask[:, :, None] for unread, mask in zip(_unread(cache, config), kept, strict=True)]
    poisoned = _poison_cache(cache, where)
    for layer in range(config.num_layers):
        order = np.argsort(-np.asarray(sparsity.routers.neurons[layer]))
        for weight in ("w_up", "w_down", "w_gate", "b_up", "b_gate"):
            path = f"layers.{layer}.mlp.{weight}"
            if path in zoo.parameters(model):
                model = zoo.with_rows(model, path, order[sparsity.plan.neurons[layer] :], NAN)
    _same(zoo.decode_step(model, token, poisoned, sparsity=sparsity), expected)


@pytest.mark.parametrize("name", SPARSE)
def test_the_cache_stays_complete(name):
    """A skipped group's key and value are written all the same: the next token may select it."""
    model, token, cache = _filled(name)
    _, after = zoo.decode_step(model, token, cache, sparsity=zoo.per_row(name))
    _, dense = zoo.decode_step(model, token, cache)
    rows, length = np.arange(3), np.asarray(cache.length)
    for new, old, full in zip((*after.k, *after.v), (*cache.k, *cache.v), (*dense.k, *dense.v), strict=True):
        new, old, full = (np.array(each) for each in (new, old, full))
        assert (new[rows, :, length] != 0).all()
        new[rows, :, length] = old[rows, :, length]
        assert (new == old).all()
        assert full.shape == new.shape


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_padding_has_no_influence(name):
    """Neither its ids, be they outside the vocabulary, nor NaN in their embeddings or positions."""
    model, (tokens, _) = zoo.model(name), zoo.batch()
    lengths = jnp.array([6, 3, 1], jnp.int32)
    valid = np.arange(9)[None] < np.asarray(lengths)[:, None]
    unused = min(set(range(zoo.VOCAB)) - set(np.asarray(tokens)[valid].tolist()))
    poisoned = zoo.with_rows(model, "embed.tokens", unused, NAN)
    if model.config.positions == "learned":
        poisoned = zoo.with_rows(
            poisoned, "embed.positions", slice(6 + model.config.position_offset, None), NAN
        )
    logits, _ = zoo.forward(model, tokens, lengths)
    read, cache = zoo.prefill(model, tokens, lengths, zoo.empty_cache(model, 3))
    reach = np.arange(zoo.VOCAB) != (unused if model.config.tie_embeddings else -1)
    for pad in (unused, -1, 10**6):
        padded = jnp.where(valid, tokens, pad)
        again, _ = zoo.forward(poisoned, padded, lengths)
        assert (np.asarray(again)[:, :9][valid][:, reach] == np.asarray(logits)[:, :9][valid][:, reach]).all()
        last, new = zoo.prefill(poisoned, padded, lengths, zoo.empty_cache(model, 3))
        assert (np.asarray(last)[:, reach] == np.asarray(read)[:, reach]).all()
        seen = np.broadcast_to(valid[:, None, :], (3, model.config.num_kv_heads, 9))
        for array, expected in zip((*new.k, *new.v), (*cache.k, *cache.v), strict=True):
            assert (np.asarray(array)[:, :, :9][seen] == np.asarray(expected)[:, :, :9][seen]).all()
