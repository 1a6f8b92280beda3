"""Checks of the arguments of scoring, and of the numbers that the model computed."""

from typing import Any, Literal, get_args

import numpy as np

from polarjax.errors import InputError, not_finite
from polarjax.model.checks import host_array
from polarjax.numeric import plain, shown, whole_number
from polarjax.types import Bool

type Mode = Literal["masked", "decode"]


def largest_context(length: int, mode: str) -> int:
    """Most tokens at the start of a window of `length` that leave one to score."""
    return length - 1 - (mode == "decode")


def check_mode(mode: Any, where: str = "evaluation") -> None:
    """Raises `InputError` unless there is such a mode."""
    if not isinstance(mode, str) or mode not in get_args(Mode.__value__):
        hint = "masked is sparse at every token, decode as generation is"
        raise InputError(
            "no such mode", where=where, got=shown(mode), expected="'masked' or 'decode'", hint=hint
        )


def check_scoring(shape: tuple[int, ...], mode: Any, batch_size: Any, context: Any) -> tuple[int, int]:
    """The batch size and context as integers; raises `InputError` if these windows can't be scored this way."""
    check_mode(mode)
    batch_size = whole_number(batch_size, "batch_size", where="evaluation")
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise InputError(
            "nothing to score",
            where="windows",
            got=f"shape {shape}",
            expected="[n T] with T at least 2",
            hint="cut the text into windows of at least two tokens",
        )
    largest = largest_context(shape[1], mode)
    context = plain(context)
    if type(context) is not int or not 0 <= context <= largest:
        raise InputError(
            "no token is left to score",
            where="context",
            got=shown(context),
            expected=f"0 to {largest}",
            hint="lower the context, or lengthen the windows",
        )
    return batch_size, context


def scored_after(
    scored: Bool[np.ndarray, "n T"] | None, shape: tuple[int, ...], context: int
) -> Bool[np.ndarray, "n after"]:
    """Which tokens after the first max(context, 1) are scored, [n, T - max(context, 1)]; None means all.

    Raises:
      InputError: `scored` is not boolean [n T] = `shape`, or no token is left.
    """
    if scored is None:
        scored = np.ones(shape, bool)
    scored = host_array(scored)
    if scored.shape != tuple(shape) or scored.dtype != bool:
        got, expected = f"{scored.dtype} {scored.shape}", f"bool {tuple(shape)}, like the windows"
        hint = "pass the field scored of scored_windows, or leave it out to score every token"
        raise InputError(
            "unusable mask of scored tokens", where="scored", got=got, expected=expected, hint=hint
        )
    counted = scored[:, max(context, 1) :]
    if not counted.any():
        raise InputError(
            "no token is left to score",
            where="scored",
            got=f"{int(scored.sum())} scored tokens, none after the first {max(context, 1)} of a window",
            hint="use more text, longer windows or less context",
        )
    return counted


def check_numbers(values: np.ndarray, counted: Bool[np.ndarray, "n after"], *, where: str) -> None:
    """Raises `InputError` if the statistic of a scored token is NaN, because the model's logits are."""
    wrong = np.argwhere(np.isnan(values) & counted)
    if len(wrong):
        first = f"the first in window {wrong[0][0]}"
        raise not_finite(where, f"{len(wrong)} of {int(counted.sum())} scored tokens, {first}")
