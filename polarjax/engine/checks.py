"""Checks of what an engine and its requests ask for; what they return is in the form that the engine takes."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from polarjax.checkpoint.bundle import Bundle, needed_tokenizer
from polarjax.checkpoint.placement import shard
from polarjax.configs import ModelConfig
from polarjax.engine.requests import Request, RowSettings
from polarjax.engine.slots import MOST_LOGPROBS, STOP_IDS
from polarjax.errors import InputError
from polarjax.generation.checks import (
    check_best,
    check_new_tokens,
    check_not_traced,
    check_penalty,
    check_sampler,
    check_seed,
    check_stop_ids,
)
from polarjax.generation.sampling import row_of
from polarjax.generation.stream import CONTEXT
from polarjax.model.checks import check_room, check_vocabulary, host_array
from polarjax.model.layout import mesh_of
from polarjax.model.spread_checks import check_spread
from polarjax.numeric import check_type
from polarjax.selection.selectors import Sparsity
from polarjax.sharding import automatic
from polarjax.text import continuation
from polarjax.text.assembly import Assembler
from polarjax.text.continuation import DEFAULT_NEW_TOKENS, ContinueOptions
from polarjax.text.prompts import as_prompts
from polarjax.types import Int32


def as_bundle(bundle: Any) -> Bundle:
    """A bundle as the engine takes it: on a mesh, with automatic axes; raises `InputError` if it isn't one."""
    check_type(bundle, Bundle, where="Engine", hint="pass pj.load(path), or pj.Bundle(model)")
    layout = bundle.model.layout
    if layout is None or not layout.mesh.explicit_axes:
        return bundle
    return shard(bundle, automatic(layout.mesh), rules=layout.rules, attention=layout.attention)


def sizes_of(bundle: Bundle, read_tokens: int) -> dict[str, Any]:
    """What `slots_and_capacity` needs to know besides what the caller asked for."""
    return {"read_tokens": read_tokens, "mesh": mesh_of(bundle.model)}


def check_dense(dense: Any, head_density: float | None) -> None:
    """Raises `InputError` unless `dense` is a boolean that doesn't contradict `head_density`."""
    check_type(dense, bool, where="Engine: dense", hint="pass True or False")
    if dense and head_density is not None:
        hint = "leave one of them out"
        raise InputError(
            "dense and head_density contradict each other", where="Engine", got=head_density, hint=hint
        )


def skipped(
    bundle: Bundle, sizes: Iterable[int], dense: bool, head_density: float | None
) -> dict[int, Sparsity | None]:
    """What to skip with each number of sequences; raises `SparsityError` if that isn't for the model or its mesh."""
    skip = bundle.sparsity_by_batch(None if dense else "auto", head_density)
    found = {size: skip(size) for size in sizes}
    for sparsity in found.values():
        check_spread(bundle.model, sparsity)
    return found


def as_request(
    number: int, prompt: Any, bundle: Bundle, capacity: int, *, seed: Any, logprobs: Any, **given: Any
) -> Request:
    """A request from what `Engine.submit` was given, which lists the errors; None is the model's own setting."""
    config, settings = bundle.model.config, bundle.generation
    ids = prompt_ids(prompt, bundle)
    wanted, usual = given.pop("max_new_tokens"), settings.max_new_tokens
    limit = check_length(config, len(ids), wanted, usual, capacity)
    options = ContinueOptions.of(settings, max_new_tokens=limit, **given)
    strings, stops = split_stops(options, bundle)
    row = row_settings(options, stops, seed, logprobs, config.vocab_size)
    assembler = None
    if bundle.tokenizer is not None:
        assembler = Assembler.of(bundle.tokenizer, ids[-CONTEXT:].tolist(), strings)
    return Request(number, ids, row, assembler)


def check_open(closed: bool) -> None:
    """Raises `InputError` if the engine is closed."""
    if closed:
        raise InputError("the engine is closed", where="Engine", hint="make another one")


def check_idle(in_use: int, where: str) -> None:
    """Raises `InputError` if slots are in use."""
    if in_use:
        raise InputError(
            "requests are running",
            where=where,
            got=f"{in_use} slots in use",
            expected="none",
            hint="do this before the engine runs requests, or once it has finished them",
        )


def split_stops(options: ContinueOptions, bundle: Bundle) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings and stop ids of a request; raises `CheckpointError` if strings can't be found without a tokenizer."""
    if not options.stop_strings:
        return (), options.stop_ids
    return continuation.split_stops(options, needed_tokenizer(bundle, "stop_strings"))


def prompt_ids(prompt: Any, bundle: Bundle) -> Int32[np.ndarray, "n"]:
    """Token ids of a text, a conversation or ids; raises `InputError` if it is none of them, or empty."""
    if isinstance(prompt, str) or (
        isinstance(prompt, list | tuple) and any(isinstance(each, str | Mapping) for each in prompt)
    ):
        asked = as_prompts([prompt])[0]
        ids = np.asarray(asked.ids(needed_tokenizer(bundle, "Engine.submit")), np.int32)
    else:
        ids = host_array(prompt)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            "not a prompt",
            where="Engine.submit",
            got=f"{ids.dtype}{list(ids.shape)}" if ids.dtype != object else type(prompt).__name__,
            expected="a text, a list of messages, or token ids [n], at least one",
            hint='pass "Once upon a time", or bundle.tokenizer.encode(…)[0][0]',
        )
    check_vocabulary(ids[None], bundle.model.config, where="Engine.submit")
    return ids.astype(np.int32)


def check_length(config: ModelConfig, tokens: int, wanted: Any, default: int | None, capacity: int) -> int:
    """The most new tokens after a prompt; raises `InputError` if prompt and tokens exceed the slot or the model."""
    if wanted is None:
        room = min(capacity, config.max_positions) + 1 - tokens
        wanted = min(default or DEFAULT_NEW_TOKENS, max(1, room))
    wanted = check_new_tokens(wanted)
    check_room(config, tokens, wanted, where="Engine.submit")
    if tokens + wanted - 1 > capacity:  # the last new token is never read
        raise InputError(
            "the sequence would exceed a slot's capacity",
            where="Engine.submit",
            got=f"{tokens} prompt tokens + {wanted} new ones",
            expected=f"at most {capacity} before the last one",
            hint="shorten the prompt, lower max_new_tokens, or give a larger capacity",
        )
    return wanted


def check_stop_count(
    count: int, *, where: str = "stop_ids", hint: str = "pass the others as stop_strings"
) -> None:
    """Raises `InputError` if a slot has no room for so many stop ids."""
    if count > STOP_IDS:
        expected = f"at most {STOP_IDS}"
        raise InputError("too many stop ids", where=where, got=count, expected=expected, hint=hint)


def row_settings(
    options: ContinueOptions, stop_ids: tuple[int, ...], seed: Any, logprobs: Any, vocab_size: int
) -> RowSettings:
    """The settings of a request as a slot takes them; raises `InputError` if a slot can't."""
    check_sampler(options.sampler)
    sampler = row_of(options.sampler)
    if sampler is None:
        raise InputError(
            "a slot can't draw with this sampler",
            where="sampler",
            got=repr(options.sampler)[:80],
            expected="Greedy(), or a Categorical of single numbers",
            hint="use pj.generate for samplers of your own",
        )
    stop_ids, penalty = check_stop_ids(stop_ids), check_penalty(options.repetition_penalty)
    check_not_traced((stop_ids, penalty), where="Engine.submit")
    check_stop_count(len(stop_ids))
    best = check_best(logprobs, min(MOST_LOGPROBS, vocab_size))
    return RowSettings(sampler, stop_ids, options.max_new_tokens, check_seed(seed), float(penalty), best)
