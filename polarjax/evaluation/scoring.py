"""Runs a model over windows of known text and scores its logits, masked or exactly as generation runs it."""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.errors import InputError
from polarjax.model.cache import init_cache
from polarjax.model.checks import check_windows
from polarjax.model.decoder import Decoder, decode_step, forward, prefill
from polarjax.progress import task
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Float, Int

type Mode = Literal["masked", "decode"]
type Statistic = Callable[[tuple[Float[Array, "... V"], ...], Int[Array, "..."]], Any]
"""(logits of each variant [... V], the tokens that came [...]) -> a tree of arrays [...]."""


def score(
    model: Decoder,
    windows: Int[np.ndarray, "n T"],
    variants: tuple[Sparsity | None, ...],
    statistic: Statistic,
    *,
    mode: Mode,
    batch_size: int,
    context: int,
    description: str,
) -> Any:
    """The statistic of every scored token of every window, a tree of arrays [n, T - max(context, 1)].

    See `polarjax.evaluation.perplexity` for the arguments and what they mean. `variants` are run side by side
    on the same tokens, None being the dense model; `statistic` must be a module-level function, since it is
    part of the compiled program's name.

    Raises:
      InputError: windows, mode, context or batch size that cannot be scored.
      SparsityError: routers or plan are for another model, or a selector that cannot decode in mode "decode".
    """
    _check(np.shape(windows), mode, batch_size, context)
    windows = check_windows(windows, model.config)
    for variant in variants:
        if variant is not None:
            variant.check(model.config)
    run = functools.partial(_masked if mode == "masked" else _decoded, statistic=statistic, context=context)
    rows = []
    with task(description, windows.shape[0], "windows") as advance:
        for start in range(0, windows.shape[0], batch_size):
            batch = windows[start : start + batch_size]
            rows.append(jax.device_get(run(model, jnp.asarray(batch), variants)))
            advance(batch.shape[0])
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


@functools.partial(jax.jit, static_argnames=("statistic", "context"))
def _masked(model: Decoder, tokens, variants, *, statistic: Statistic, context: int):
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    first = max(context, 1)
    logits = tuple(
        forward(model, tokens, lengths, sparsity=variant)[0][:, first - 1 : -1] for variant in variants
    )
    return statistic(logits, tokens[:, first:])


@functools.partial(jax.jit, static_argnames=("statistic", "context"))
def _decoded(model: Decoder, tokens, variants, *, statistic: Statistic, context: int):
    """One scan over the tokens: each is fed to every variant, whose logits are scored against the next."""
    batch_size, length = tokens.shape
    cache = lambda: init_cache(model.config, batch_size=batch_size, capacity=length, dtype=model.dtype)
    caches = tuple(cache() for _ in variants)
    before = []  # the statistic of the first scored token, which the dense prefill predicts
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


def largest_context(length: int, mode: str) -> int:
    """Most tokens at the start of a window of `length` that leave one to score."""
    return length - 1 - (mode == "decode")


def _check(shape: tuple[int, ...], mode: str, batch_size: int, context: int) -> None:
    if mode not in get_args(Mode.__value__):
        raise InputError("no such mode", where="evaluation", got=repr(mode), expected="'masked' or 'decode'")
    if batch_size < 1:
        raise InputError("batch_size is too small", where="evaluation", got=batch_size, expected="at least 1")
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise InputError(
            "nothing to score",
            where="windows",
            got=f"shape {shape}",
            expected="[n T] with T at least 2",
            hint="cut the text into windows of at least two tokens",
        )
    largest = largest_context(shape[1], mode)
    if not 0 <= context <= largest:
        raise InputError(
            "no token is left to score",
            where="context",
            got=context,
            expected=f"0 to {largest}",
        )
