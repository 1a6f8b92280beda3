"""Checks of what a caller asks a generation for; what they return is in one form, whatever form it was given in."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.generation.sampling import Greedy, Sampler
from polarjax.generation.token_loop import is_token_id
from polarjax.model.checks import check_room, check_vocabulary, host_array, wrong_shape
from polarjax.numeric import LARGEST, plain
from polarjax.types import Array, Bool, Key


def as_batch(tokens: Any, lengths: Any) -> tuple[Any, Any]:
    """Prompts as arrays: traced ones as they are, others as NumPy arrays, which are read from the device once."""
    return _array(tokens, "tokens"), _array(lengths, "lengths")


def _array(value: Any, where: str) -> Any:
    if isinstance(value, Tracer | np.ndarray):
        return value
    try:
        array = np.asarray(jax.device_get(value))
    except (ValueError, TypeError, OverflowError):  # rows of different lengths, or no numbers
        array = None
    if array is None or array.dtype == object:
        ragged = isinstance(value, list | tuple)
        raise InputError(
            "rows of different lengths, or something that is not a number" if ragged else "not an array",
            where=where,
            got="a list" if ragged else repr(value)[:80],
            expected="an int32 array",
            hint="pad the prompts on the right to one width and pass their lengths",
        )
    return array


def check_prompts(config: ModelConfig, tokens, lengths, max_new_tokens: int) -> None:
    """Raises `InputError` on prompts that cannot be continued; values are checked only where they are concrete."""
    if tokens.ndim != 2 or tokens.size == 0 or lengths.shape != tokens.shape[:1]:
        raise wrong_shape(tokens, lengths, where="generate")
    if not all(jnp.issubdtype(each.dtype, jnp.integer) for each in (tokens, lengths)):
        raise InputError(
            "prompts are not whole numbers",
            where="generate",
            got=f"tokens {tokens.dtype}, lengths {lengths.dtype}",
            expected="int32",
            hint="pass token ids as a tokenizer gives them",
        )
    if isinstance(tokens, Tracer) or isinstance(lengths, Tracer):
        longest = tokens.shape[1]
    else:
        longest = _check_values(config, tokens, lengths)
    check_room(config, longest, max_new_tokens, where="generate")


def _check_values(config: ModelConfig, tokens: np.ndarray, lengths: np.ndarray) -> int:
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        row = int(np.argmax((lengths < 1) | (lengths > tokens.shape[1])))
        raise InputError(
            f"row {row} has an impossible length",
            where="lengths",
            got=int(lengths[row]),
            expected=f"1 to {tokens.shape[1]}, the width of tokens",
            hint="give every row at least one token",
        )
    valid = np.arange(tokens.shape[1])[None] < lengths[:, None]
    check_vocabulary(tokens, config, where="tokens", valid=valid)
    return int(lengths.max())


def check_new_tokens(count: Any) -> int:
    """`count` if so many tokens can be asked for; raises `InputError` otherwise."""
    count = plain(count)
    if type(count) is not int or not 1 <= count <= LARGEST:
        few = type(count) is int and count < 1
        raise InputError(
            "nothing to generate" if few else "not a number of tokens",
            where="max_new_tokens",
            got=_shown(count),
            expected=f"a positive whole number, at most {LARGEST}",
            hint="pass for example max_new_tokens=64",
        )
    return count


def check_copies(count: Any, sampler: Sampler) -> int:
    """`count` if so many sequences of a prompt can be had; raises `InputError` otherwise."""
    count = plain(count)
    if type(count) is not int or not 1 <= count <= LARGEST:
        raise InputError(
            "no sequences" if type(count) is int and count < 1 else "not a number of sequences",
            where="num_return_sequences",
            got=_shown(count),
            expected=f"1 to {LARGEST}",
            hint="pass for example 4",
        )
    if count > 1 and type(sampler) is Greedy:
        raise InputError(
            "greedy sequences of one prompt are all the same",
            where="num_return_sequences",
            got=count,
            expected="1",
            hint="draw them: Categorical(), or --temperature 1",
        )
    return count


def check_best(count: Any, most: int, where: str = "logprobs") -> int | None:
    """`count` if log-probabilities of so many likeliest tokens can be had, or None; raises `InputError` otherwise."""
    count = plain(count)
    if count is None or (type(count) is int and 0 <= count <= most):
        return count
    raise InputError(
        "unusable number of likeliest tokens",
        where=where,
        got=_shown(count),
        expected=f"0 to {most}, or None for no log-probabilities",
        hint="pass 0 for those of the generated tokens alone",
    )


def check_stop_ids(ids: Any) -> Any:
    """One id, several, or None, as a tuple; traced ids as int32 [n]. Raises `InputError` if there is no such id."""
    if isinstance(ids, Tracer):
        if ids.ndim > 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise _no_stop_ids(f"{ids.dtype}{list(ids.shape)}")
        return jnp.atleast_1d(ids).astype(jnp.int32)
    ids = plain(jax.device_get(ids) if isinstance(ids, jax.Array) else ids)
    if isinstance(ids, str | bytes | Mapping):
        raise _no_stop_ids(_shown(ids))
    try:
        ids = () if ids is None else tuple(map(plain, ids))
    except TypeError:  # one id
        ids = (ids,)
    for each in ids:
        if not is_token_id(each):
            raise _no_stop_ids(_shown(each))
    return ids


def _no_stop_ids(got: str) -> InputError:
    return InputError(
        "not a token id",
        where="stop_ids",
        got=got,
        expected=f"whole numbers, 0 to {LARGEST}",
        hint="pass ids of the model's tokenizer",
    )


def check_penalty(penalty: Any) -> Any:
    """A penalty as a float32 scalar, a traced one as it is; raises `InputError` if it is out of range."""
    if isinstance(penalty, Tracer) and not penalty.ndim:
        return penalty.astype(jnp.float32)
    penalty = plain(penalty)
    if type(penalty) not in (int, float) or not 0 < penalty < math.inf:
        raise InputError(
            "unusable penalty",
            where="repetition_penalty",
            got=_shown(penalty),
            expected="above 0",
            hint="1 is no penalty, 1.1 a mild one",
        )
    limits = np.finfo(np.float32)
    return np.float32(min(max(penalty, float(limits.tiny)), float(limits.max)))


def check_sampler(sampler: Any) -> None:
    """Raises `InputError` unless `sampler` is called with logits and a key."""
    if isinstance(sampler, type) or not callable(sampler):
        raise _no_sampler(sampler)
    try:
        hash(sampler)
        inspect.signature(sampler).bind(None, None)
    except (TypeError, ValueError) as error:
        if isinstance(error, ValueError) or holds_arrays(sampler):  # no signature to be read, or a pytree
            return
        raise _no_sampler(sampler) from error


def _no_sampler(sampler: Any) -> InputError:
    return InputError(
        "not a sampler",
        where="sampler",
        got=repr(sampler)[:80],
        expected="a hashable value that is called with logits and a key",
        hint="pass pj.Greedy() or pj.Categorical(temperature=0.8)",
    )


def holds_arrays(sampler: Any) -> bool:
    """Whether a sampler is a pytree with arrays in it, so that it can't be static."""
    return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(sampler))


SEEDS = range(-(2**63), 2**63)  # what JAX takes


def random_key(key: Key[Array, ""] | int, where: str = "key") -> Key[Array, ""]:
    """`key` itself, or the random key of a seed; raises `InputError` if there is none for it."""
    if getattr(key, "ndim", 0) or (
        isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    ):
        _check_key(key)
        return key  # pyrefly: ignore[bad-return]
    seed = jax.device_put(np.int64(check_seed(key, where)))  # explicitly, for jax.transfer_guard
    return jax.random.key(seed)


def folded(key: Key[Array, ""], number: int) -> Key[Array, ""]:
    """`jax.random.fold_in`, whose number is moved to the device explicitly, for `jax.transfer_guard`."""
    return jax.random.fold_in(key, jax.device_put(np.uint32(number)))


def check_seed(seed: Any, where: str = "seed") -> int:
    """`seed` if JAX has a random key for it; raises `InputError` otherwise."""
    seed = plain(seed)
    if type(seed) is not int or seed not in SEEDS:
        expected = f"{SEEDS[0]} to {SEEDS[-1]}"
        raise InputError(
            "no such seed", where=where, got=_shown(seed), expected=expected, hint="give 0, 1, 2, …"
        )
    return seed


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    shape = () if typed else jax.eval_shape(lambda: jax.random.PRNGKey(0)).shape
    if dtype is None or (shape and dtype != np.uint32) or key.shape != shape:
        raise InputError(
            "not a random key",
            where="key",
            got=repr(key)[:80] if dtype is None else f"{dtype}{list(key.shape)}",
            expected="one key",
            hint="pass key=jax.random.key(0)",
        )


def checked_rows(rows: Any, count: int) -> Bool[np.ndarray, "B"]:
    """Booleans [B] for the B rows of a stream; raises `InputError` for anything else, which NumPy would spread."""
    found = host_array(rows)
    if found.dtype != bool or found.shape != (count,):
        raise InputError(
            "not a choice of rows",
            where="TokenStream.halt",
            got=f"{found.dtype}{list(found.shape)}",
            expected=f"booleans [{count}]",
            hint="pass one boolean for each row",
        )
    return found


def check_not_traced(values: Any, where: str) -> None:
    """Raises `InputError` inside `jax.jit` and other transformations, where no token can be seen on the host."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        raise InputError(
            "tokens can't be streamed while a function is traced",
            where=where,
            got="a traced value",
            expected="arrays",
            hint="call it outside jax.jit, or use generate inside",
        )


def _shown(value: Any) -> str:
    traced = isinstance(value, Tracer)
    return "a traced value, which shapes the result" if traced else repr(value)[:80]
