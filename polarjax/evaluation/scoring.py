"""Runs a model over windows of text and scores its logits, masked or as in generation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.evaluation.checks import Mode, check_scoring, scored_after
from polarjax.model.cache import init_cache
from polarjax.model.checks import check_model, check_windows, host_array
from polarjax.model.decoder import Decoder, decode_step, forward, prefill
from polarjax.model.layout import mesh_of
from polarjax.model.meshes import on_any_mesh
from polarjax.model.readable import fetched
from polarjax.model.spread_checks import check_around
from polarjax.progress import task
from polarjax.selection.checks import check_sparsity
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Bool, Float, Int

type Statistic = Callable[[tuple[Float[Array, "... V"], ...], Int[Array, "..."]], Any]
"""(logits of each variant [... V], the true next tokens [...]) -> a tree of arrays [...]."""


def score(
    model: Decoder,
    windows: Int[np.ndarray, "n T"],
    variants: tuple[Sparsity | None, ...],
    statistic: Statistic,
    *,
    mode: Mode,
    batch_size: int,
    context: int,
    scored: Bool[np.ndarray, "n T"] | None,
    description: str,
) -> tuple[Any, Bool[np.ndarray, "n after"]]:
    """Computes a statistic of every token after the context, as arrays [n, T - max(context, 1)], and which are scored.

    See `polarjax.evaluation.perplexity` for the arguments. `variants` run side by side on the same tokens; None
    means dense. `statistic` must be a module-level function, because it is a key of the compilation cache.

    Raises:
      InputError: windows, mode, context, mask or batch size that cannot be scored.
      SparsityError: routers or plan are for another model, or mode is "decode" and the selector cannot decode.
    """
    check_model(model, where="evaluation")
    check_around(model)
    for variant in variants:
        check_sparsity(variant, model.config)
    windows = host_array(windows)
    batch_size, context = check_scoring(windows.shape, mode, batch_size, context)
    counted = scored_after(scored, windows.shape, context)
    windows = check_windows(windows, model.config)
    run = functools.partial(_masked if mode == "masked" else decoded, statistic=statistic, context=context)
    rows = []
    with task(description, windows.shape[0], "windows") as advance:
        for start in range(0, windows.shape[0], batch_size):
            batch = windows[start : start + batch_size]
            count, parts = len(batch), mesh_of(model).batch_parts if mode == "decode" else 1
            batch = np.concatenate([batch, batch[np.zeros(-count % parts, int)]])  # devices divide it evenly
            found = fetched(run(model, jax.device_put(batch), variants))
            rows.append(jax.tree.map(lambda leaf, count=count: leaf[:count], found))
            advance(count)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows), counted


@functools.partial(jax.jit, static_argnames=("statistic", "context"))
@on_any_mesh("tokens", lambda places: places.rows)
def _masked(model: Decoder, tokens, variants, *, statistic: Statistic, context: int):
    logits = tuple(masked_logits(model, tokens, variant, context=context) for variant in variants)
    return statistic(logits, tokens[:, first_scored(context) :])


def first_scored(context: int) -> int:
    """Position of a window's first token that can be scored; nothing predicts the first of all."""
    return max(context, 1)


def masked_logits(
    model: Decoder, tokens: Int[Array, "B T"], sparsity: Sparsity | None, *, context: int
) -> Float[Array, "B after V"]:
    """Logits that predict the tokens after the context, with the selection applied as a mask. Traceable."""
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    return forward(model, tokens, lengths, sparsity=sparsity)[0][:, first_scored(context) - 1 : -1]


@functools.partial(jax.jit, static_argnames=("statistic", "context"))
@on_any_mesh("tokens", lambda places: places.rows)
def decoded(model: Decoder, tokens, variants, *, statistic: Statistic, context: int):
    """One scan over the tokens: every variant reads it, and its logits are scored against the next one."""
    batch_size, length = tokens.shape
    cache = lambda: init_cache(model.config, batch_size=batch_size, capacity=length, dtype=model.dtype)
    caches = tuple(cache() for _ in variants)
    before = []  # statistic of the first scored token, predicted by the dense prefill
    if context:
        lengths = jnp.full((batch_size,), context, jnp.int32)
        read = [prefill(model, tokens[:, :context], lengths, cache) for cache in caches]
        caches = tuple(cache for _, cache in read)
        before = [statistic(tuple(logits for logits, _ in read), tokens[:, context])]

    def step(caches, pair):
        stepped = [
            decode_step(model, pair[0], cache, sparsity=variant)
            for cache, variant in zip(caches, variants, strict=True)
        ]
        return tuple(cache for _, cache in stepped), statistic(tuple(out for out, _ in stepped), pair[1])

    columns = tokens.T
    _, after = jax.lax.scan(step, caches, (columns[context:-1], columns[context + 1 :]))
    by_row = jax.tree.map(lambda values: values.T, after)  # [steps B] -> [B steps]
    first = [jax.tree.map(lambda value: value[:, None], item) for item in before]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *first, by_row)
