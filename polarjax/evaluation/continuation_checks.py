"""Checks of continuations to score, and of their scores."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError, not_finite
from polarjax.model.checks import check_vocabulary
from polarjax.numeric import plain, shown, whole_number


def check_continuations(pairs: Sequence[Any], config: ModelConfig, batch_size: Any, max_length: Any) -> int:
    """The most tokens that the model may read at once; raises `InputError` if the pairs can't be scored so."""
    if batch_size is not None:
        whole_number(batch_size, "batch_size", where="evaluation")
    longest = window_length(max_length, config)
    for i, pair in enumerate(pairs):
        context, continuation = _ids(pair, i)
        for name, ids in (("context", context), ("continuation", continuation)):
            if not len(ids):
                raise InputError(
                    f"a {name} has no tokens",
                    where=f"request {i}",
                    hint=f"give every request a {name} of at least one token",
                )
        if len(continuation) > longest:
            raise InputError(
                "a continuation is longer than the window",
                where=f"request {i}",
                got=f"{len(continuation):,} tokens",
                expected=f"at most {longest:,}",
                hint="shorten it, raise max_length if it is below the model's positions, or score it by rolling windows",
            )
        check_vocabulary(np.concatenate([context, continuation])[None], config, where=f"request {i}")
    return longest


def _ids(pair: Any, i: int) -> list[np.ndarray]:
    """The token ids of a context and of its continuation; raises `InputError` unless they are integers."""
    try:
        both = [np.asarray(tuple(ids)) for ids in pair]
    except TypeError:  # not a sequence
        both = []
    if len(both) != 2 or any(ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu") for ids in both):
        hint = "pass two sequences of token ids, such as ([1, 5], [9])"
        raise InputError("not a context and a continuation", where=f"request {i}", got=shown(pair), hint=hint)
    return [ids.astype(np.int64) for ids in both]


def window_length(max_length: Any, config: ModelConfig) -> int:
    """`max_length`, by default the model's positions; raises `InputError` unless it is 1 to the model's positions."""
    if max_length is None:
        return config.max_positions
    value = plain(max_length)
    if type(value) is not int or not 1 <= value <= config.max_positions:
        raise InputError(
            "max_length is not usable",
            where="evaluation",
            got=shown(max_length),
            expected=f"1 to {config.max_positions}, the model's positions",
            hint="leave it out to use them all",
        )
    return value


def check_scores(log_likelihoods: Sequence[float]) -> None:
    """Raises `InputError` if one is NaN, because the model's logits are."""
    wrong = sum(map(math.isnan, log_likelihoods))
    if wrong:
        raise not_finite("log-likelihoods", f"{wrong} of {len(log_likelihoods)} requests of a batch")
