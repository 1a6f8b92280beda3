"""Checks of a model's tokens and cache."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model.cache import KVCache
from polarjax.model.taps import TapSpec
from polarjax.numeric import check_type
from polarjax.types import IMPLEMENTATIONS, Array, Bool, DTypeLike, Int, Int32


def check_vocabulary(
    tokens: Int[np.ndarray, "B T"],
    config: ModelConfig,
    *,
    where: str,
    valid: Bool[np.ndarray, "B T"] | None = None,
) -> None:
    """Raises `InputError`, naming the first one, if token ids (the `valid` ones) are outside [0, V)."""
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


def host_array(value: Any) -> np.ndarray:
    """The value as a NumPy array; one of objects if its rows have different lengths, or if it is traced."""
    with contextlib.suppress(ValueError, TypeError):
        if isinstance(value, list | tuple) and all(type(each) is int for each in value):
            return np.asarray(value)  # device_get would take 2 µs for each
        return np.asarray(jax.device_get(value))
    return np.empty((), object)


def check_windows(
    windows: Int[np.ndarray, "n T"], config: ModelConfig, *, where: str = "windows"
) -> Int32[np.ndarray, "n T"]:
    """The windows as int32; raises `InputError` unless they are n > 0 windows of the model's tokens.

    Args:
      windows: token ids, all T of each window valid.
      config: the model's configuration.
      where: their name in an error.
    """
    windows = host_array(windows)
    if windows.ndim != 2 or windows.size == 0 or not np.issubdtype(windows.dtype, np.integer):
        raise InputError(
            "not token windows",
            where=where,
            got=f"{windows.dtype} {list(windows.shape)}",
            expected="integers [n T], n, T > 0",
            hint="pass rows of token ids, all of the same length",
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
    """Raises `InputError` if a prompt and its new tokens exceed the model's positions; `option` names the argument."""
    if prompt_tokens + new_tokens - 1 > config.max_positions:  # the last new token is never read
        raise InputError(
            "the sequence would exceed the model's positions",
            where=where,
            got=f"{prompt_tokens} prompt tokens + {new_tokens} new ones",
            expected=f"at most {config.max_positions} before the last one",
            hint=f"shorten the prompt or lower {option}",
        )


def wrong_shape(tokens: Any, lengths: Any, *, where: str) -> InputError:
    """The error for tokens and lengths that aren't a batch of prompts."""
    return InputError(
        "prompts have the wrong shape",
        where=where,
        got=f"tokens {list(tokens.shape)}, lengths {list(lengths.shape)}",
        expected="tokens [B T] and lengths [B], neither empty",
        hint="pad the prompts on the right to the same width and pass their lengths",
    )


def as_prompts(
    config: ModelConfig, tokens: Any, lengths: Any, *, where: str
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Tokens and lengths as int32 arrays; raises `InputError` unless they are whole numbers [B T] and [B] that fit.

    T is known during tracing, so a learned position table is never read past its end.
    """
    tokens, lengths = _whole_numbers("tokens", tokens, where), _whole_numbers("lengths", lengths, where)
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or 0 in tokens.shape:
        raise wrong_shape(tokens, lengths, where=where)
    T = tokens.shape[1]
    if config.positions == "learned" and isinstance(T, int) and config.max_positions < T:
        raise InputError(
            "the tokens are longer than the model's positions",
            where=where,
            got=f"{T} tokens",
            expected=f"at most {config.max_positions}",
            hint="cut the tokens, or pad them less",
        )
    return tokens, lengths


def as_step(token: Any) -> Int[Array, "B"]:
    """The tokens of a decoding step as an int32 array; raises `InputError` unless they are whole numbers [B]."""
    token = _whole_numbers("token", token, "decode_step")
    if token.ndim != 1:
        raise InputError(
            "token has the wrong shape",
            where="decode_step",
            got=list(token.shape),
            expected="[B]: one token for each sequence",
            hint="pass tokens[:, i], or jnp.argmax(logits, -1)",
        )
    return token


def as_live(live: Any, batch_size: int) -> Bool[Array, "B"] | None:
    """The rows of a decoding step that are wanted; raises `InputError` unless they are None or booleans [B]."""
    if live is None:
        return None
    with contextlib.suppress(TypeError, ValueError):
        live = jnp.asarray(live)
        if live.dtype == bool and live.shape == (batch_size,):
            return live
    raise InputError(
        "not a choice of rows",
        where="live",
        got=f"{live.dtype}{list(live.shape)}" if isinstance(live, Array) else type(live).__name__,
        expected="booleans [B], or None for all",
        hint="pass one boolean for each sequence",
    )


def check_taps(taps: Any) -> None:
    """Raises `InputError` unless `taps` says what to record, or is None."""
    if taps is not None:
        check_type(taps, TapSpec, where="taps", hint="pass None, or a TapSpec")


def check_implementation(implementation: Any) -> None:
    """Raises `InputError` unless `implementation` is None or one that the kernels have."""
    if implementation is not None and (
        not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS
    ):
        raise InputError(
            "no such implementation",
            where="implementation",
            got=repr(implementation)[:80],
            expected=" | ".join(IMPLEMENTATIONS),
            hint="leave it out for the best one of this device",
        )


def check_cache(
    config: ModelConfig, dtype: DTypeLike, cache: KVCache, batch_size: int, *, where: str
) -> None:
    """Raises `InputError` unless a cache is for this model, its dtype and `batch_size` sequences."""
    if not isinstance(cache, KVCache):
        hint = "pass the KVCache that init_cache or prefill returned"
        raise InputError("not a cache", where=where, got=type(cache).__name__, hint=hint)
    first = cache.k[0]
    got = (len(cache.k), first.shape[0], first.shape[1], first.shape[3])
    K, H = config.num_kv_heads, config.head_dim
    if got != (config.num_layers, batch_size, K, H):
        raise InputError(
            "the cache is for another batch or model",
            where=where,
            got="{} layers of [{} {} S {}]".format(*got),
            expected=f"{config.num_layers} layers of [{batch_size} {K} S {H}]",
            hint="make it with init_cache for this config and batch size",
        )
    if first.dtype != dtype:
        raise InputError(
            "the cache's dtype is not the model's",
            where=where,
            got=first.dtype,
            expected=dtype,
            hint="make it with init_cache(..., dtype=model.dtype)",
        )


def check_capacity(cache: KVCache, length: int) -> None:
    """Raises `InputError` unless prompts of `length` tokens fit into a cache."""
    if isinstance(length, int) and length > cache.capacity:
        raise InputError(
            "the prompts do not fit into the cache",
            where="prefill",
            got=f"{length} tokens",
            expected=f"at most the cache's capacity of {cache.capacity}",
            hint="pass a larger capacity to init_cache",
        )


def _whole_numbers(name: str, value: Any, where: str) -> Array:
    with contextlib.suppress(TypeError, ValueError):
        array = jnp.asarray(value)
        if jnp.issubdtype(array.dtype, jnp.integer):
            return array.astype(jnp.int32)  # with x64, NumPy's are int64
    raise InputError(
        f"{name} are not whole numbers",
        where=where,
        got=getattr(value, "dtype", type(value).__name__),
        expected="int32",
        hint="pass token ids from a tokenizer, and integer lengths",
    )


def check_model(model: Any, *, where: str) -> None:
    """Raises `InputError` unless `model` is a decoder, or looks like one."""
    if not isinstance(getattr(model, "config", None), ModelConfig):
        raise InputError(
            "not a model",
            where=where,
            got=type(model).__name__,
            expected="a Decoder",
            hint="pass bundle.model of bundle = pj.load(path)",
        )
