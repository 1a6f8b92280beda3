"""Continues prompts batch by batch, for the command and `Bundle.complete`."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from polarjax.errors import InputError
from polarjax.generation.batch import positions
from polarjax.generation.checks import check_new_tokens, check_stop_ids, folded
from polarjax.generation.generate import generate
from polarjax.generation.sampling import Sampler
from polarjax.generation.settings import GenerationSettings
from polarjax.generation.stream import CONTEXT, stream
from polarjax.memory import explained_out_of_memory
from polarjax.model.checks import check_room
from polarjax.model.decoder import Decoder
from polarjax.model.layout import mesh_of
from polarjax.numeric import plain, shown
from polarjax.progress import task
from polarjax.selection.selectors import Sparsity
from polarjax.text.assembly import Completion, TextStream, check_stop_strings, complete
from polarjax.text.prompts import Prompt
from polarjax.text.tokenizer import Tokenizer
from polarjax.types import Array, Key

DEFAULT_NEW_TOKENS = 64

type Row = Sequence[int]
type Show = Callable[[tuple[str, ...]], None]
type Skip = Callable[[int], Sparsity | None]
"""Sparsity for a batch of this many sequences; None is the dense model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinueOptions:
    """How prompts are continued.

    Attributes:
      sampler: draws the tokens.
      max_new_tokens: M, the most tokens of a sequence.
      stop_ids: ids that end a sequence.
      stop_strings: strings that end a sequence and are cut off; a special token counts as a stop id.
      repetition_penalty: 1 disables it.
      copies: sequences per prompt, in consecutive rows.
      batch_size: prompts per batch; None takes all.
    """

    sampler: Sampler
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    copies: int = 1
    batch_size: int | None = None

    @classmethod
    def of(cls, settings: GenerationSettings, **given: Any) -> "ContinueOptions":
        """Options from a model's settings; `given` fields that are not None override them.

        Raises:
          InputError: a batch size, stop ids or stop strings that cannot be used.
        """
        names = ("sampler", "stop_ids", "stop_strings", "repetition_penalty")
        asked = {name: getattr(settings, name) for name in names}
        made = cls(**asked | {name: value for name, value in given.items() if value is not None})
        checked = {
            "batch_size": check_batch_size(made.batch_size),
            "stop_ids": check_stop_ids(made.stop_ids),
            "stop_strings": check_stop_strings(made.stop_strings),
        }
        return dataclasses.replace(made, **checked)


def check_batch_size(count: int | None, where: str = "batch_size") -> int | None:
    """`count` as an int, or None; raises `InputError` unless it is None or a positive whole number."""
    count = plain(count)
    if count is not None and (type(count) is not int or count < 1):
        raise InputError("no prompts in a batch", where=where, got=shown(count), hint="give 1 or more")
    return count


def count_new_tokens(
    wanted: int | None,
    prompts: Sequence[Prompt],
    rows: Sequence[Row],
    model: Decoder,
    settings: GenerationSettings,
    *,
    option: str = "max_new_tokens",
) -> int:
    """Tokens to generate: `wanted`, or the model's setting, or `DEFAULT_NEW_TOKENS` limited by the room.

    Args:
      wanted: M; None leaves it to the model.
      prompts: B prompts, which errors name.
      rows: their token ids.
      model: the decoder.
      settings: the model's settings.
      option: name of M in an error.

    Raises:
      InputError: no token is wanted, or more than fit after the longest prompt.
    """
    config, longest = model.config, max(range(len(rows)), key=lambda i: len(rows[i]))
    if wanted is None:
        room = config.max_positions + 1 - len(rows[longest])  # the last new token is never read
        wanted = min(settings.max_new_tokens or DEFAULT_NEW_TOKENS, max(room, 1))
    wanted = check_new_tokens(wanted)
    check_room(config, len(rows[longest]), wanted, where=prompts[longest].name, option=option)
    return wanted


def continue_all(
    model: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    key: Key[Array, ""],
    options: ContinueOptions,
    *,
    skip: Skip,
    show: Show | None = None,
) -> list[Completion]:
    """The completions of `continue_batches` in one list."""
    batches = continue_batches(model, tokenizer, rows, key, options, skip=skip, show=show)
    return [each for batch in batches for each in batch]


def continue_batches(
    model: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    key: Key[Array, ""],
    options: ContinueOptions,
    *,
    skip: Skip,
    show: Show | None = None,
) -> Iterator[Sequence[Completion]]:
    """Continues any number of prompts batch by batch; `copies` completions for each, in the order of the prompts.

    A smaller last batch is padded with repeats if it is dense, to avoid another compilation. A sparse one isn't: neurons
    are chosen for the whole batch, so repeats would change the result. On a mesh, every batch is padded to a multiple of
    the devices that divide it.

    Args:
      model: the decoder.
      tokenizer: the model's tokenizer.
      rows: prompts as token ids.
      key: random key; the first batch draws with it, the others with keys folded from it.
      options: sampler, limits and batch size.
      skip: what to skip, by the number of sequences in a batch.
      show: called with the new text of each row of a batch while it is made.

    Raises:
      InputError: a prompt is empty or too long, an option does not fit, or the device's memory runs out.
    """
    size = min(options.batch_size or len(rows), len(rows))
    compiled: set[int] = set()
    several = task("generating", len(rows), "prompts") if size < len(rows) else nullcontext(lambda _: None)
    with several as advance:
        for i, start in enumerate(range(0, len(rows), size)):
            batch = list(rows[start : start + size])
            count, needed = len(batch), _positions(model, batch, options)
            full = _divisible(model, count, options.copies)
            sparsity = skip(full * options.copies)
            if sparsity is None and needed in compiled:
                full = _divisible(model, size, options.copies)
            batch += batch[-1:] * (full - count)
            compiled.add(needed)
            batch_key = folded(key, i) if i else key
            done = continue_rows(model, tokenizer, batch, batch_key, options, sparsity=sparsity, show=show)
            advance(count)
            yield done[: count * options.copies]


def continue_rows(
    model: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    key: Key[Array, ""],
    options: ContinueOptions,
    *,
    sparsity: Sparsity | None = None,
    show: Show | None = None,
) -> tuple[Completion, ...]:
    """Continues a batch of prompts; in one call, or in chunks if there is `show` or a stop string.

    See `continue_batches`, which makes the batches.
    """
    stop_strings, stop_ids = split_stops(options, tokenizer)
    arguments = {
        "sampler": options.sampler,
        "max_new_tokens": options.max_new_tokens,
        "stop_ids": stop_ids,
        "repetition_penalty": options.repetition_penalty,
        "num_return_sequences": options.copies,
        "sparsity": sparsity,
    }
    batch = (model, *_padded(rows), key)
    count, length = len(rows) * options.copies, _positions(model, rows, options)
    sizes = {"batch_size": count, "cache_length": length, "dtype": model.dtype, "mesh": mesh_of(model)}
    with explained_out_of_memory(model.config, **sizes):
        if show is None and not stop_strings:
            made = jax.block_until_ready(generate(*batch, **arguments))
            return complete(made, tokenizer, [row[-CONTEXT:] for row in rows for _ in range(options.copies)])
        texts = TextStream(stream(*batch, **arguments), tokenizer, stop_strings=stop_strings)
        for pieces in texts:
            if show is not None:
                show(pieces)
        return texts.completions


def split_stops(options: ContinueOptions, tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop strings, and stop ids, which include the stop strings that are special tokens."""
    special = {each: tokenizer.special_id(each) for each in options.stop_strings}
    strings = tuple(each for each, token in special.items() if token is None)
    return strings, (*options.stop_ids, *(token for token in special.values() if token is not None))


def _divisible(model: Decoder, count: int, copies: int) -> int:
    """The least number of prompts from `count` on whose copies the devices of the model's mesh divide evenly."""
    parts = mesh_of(model).batch_parts
    step = parts // math.gcd(parts, copies)
    return -(-count // step) * step


def _positions(model: Decoder, rows: Sequence[Row], options: ContinueOptions) -> int:
    return positions(model.config, max(map(len, rows)), options.max_new_tokens)


def _padded(rows: Sequence[Row]) -> tuple[Array, Array]:
    """Tokens int32 [B T], padded on the right, and lengths int32 [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max(initial=0)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return jax.device_put((tokens, lengths))
