"""What a model's tokens must be, said once: inside the vocabulary, and no longer than its positions."""

import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.types import Bool, Int, Int32


def check_vocabulary(
    tokens: Int[np.ndarray, "B T"],
    config: ModelConfig,
    *,
    where: str,
    valid: Bool[np.ndarray, "B T"] | None = None,
) -> None:
    """Raises `InputError`, which names the first one, where token ids (those `valid`) are outside [0, V)."""
    wrong = (tokens < 0) | (tokens >= config.vocab_size)
    if valid is not None:
        wrong &= valid
    if wrong.any():
        row, column = map(int, np.argwhere(wrong)[0])
        raise InputError(
            f"row {row}, token {column} is outside the vocabulary",
            where=where,
            got=int(tokens[row, column]),
            expected=f"0 to {config.vocab_size - 1}",
            hint="use the tokenizer that belongs to this model",
        )


def check_windows(
    windows: Int[np.ndarray, "n T"], config: ModelConfig, *, where: str = "windows"
) -> Int32[np.ndarray, "n T"]:
    """The windows as int32; raises `InputError` unless they are n > 0 windows of the model's tokens.

    Args:
      windows: token ids, all T of each window valid.
      config: of the model.
      where: what an error calls them.
    """
    windows = np.asarray(windows)
    if windows.ndim != 2 or windows.size == 0 or not np.issubdtype(windows.dtype, np.integer):
        raise InputError(
            "not token windows",
            where=where,
            got=f"{windows.dtype} {list(windows.shape)}",
            expected="integers [n T], n, T > 0",
            hint="pass rows of token ids, all of one length",
        )
    if windows.shape[1] > config.max_positions:
        raise InputError(
            "the windows are longer than the model's positions",
            where=where,
            got=f"{windows.shape[1]} tokens",
            expected=f"at most {config.max_positions}",
            hint="cut shorter windows",
        )
    check_vocabulary(windows, config, where=where)
    return windows.astype(np.int32, copy=False)


def check_room(
    config: ModelConfig, prompt_tokens: int, new_tokens: int, *, where: str, option: str = "max_new_tokens"
) -> None:
    """Raises `InputError` where a prompt and its new tokens outgrow the model; `option` sets how many are new."""
    if prompt_tokens + new_tokens - 1 > config.max_positions:  # the last new token is never read
        raise InputError(
            "the sequence would outgrow the model's positions",
            where=where,
            got=f"{prompt_tokens} prompt tokens + {new_tokens} new ones",
            expected=f"at most {config.max_positions} before the last one",
            hint=f"shorten the prompt or lower {option}",
        )
