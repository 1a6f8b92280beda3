"""Texts out of token rows, as a model's settings ask for: what the command and a script both want."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.generation.batch import positions
from polarjax.generation.generate import generate
from polarjax.generation.settings import GenerationSettings
from polarjax.generation.stream import CONTEXT, stream
from polarjax.memory import explained_out_of_memory
from polarjax.model.decoder import Decoder
from polarjax.selection.selectors import Sparsity
from polarjax.text.assembly import Completion, TextStream, complete
from polarjax.text.tokenizer import Tokenizer
from polarjax.types import Array, Key

type Show = Callable[[tuple[str, ...]], None]


def continue_rows(
    model: Decoder,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    key: Key[Array, ""],
    *,
    settings: GenerationSettings,
    max_new_tokens: int,
    copies: int = 1,
    sparsity: Sparsity | None = None,
    show: Show | None = None,
) -> tuple[Completion, ...]:
    """Continues a batch of prompts; the tokens come in one go, or in chunks if `show` or stop strings ask for it.

    Args:
      model: the decoder.
      tokenizer: of the model.
      rows: B prompts as token ids.
      key: random key.
      settings: sampler, stop ids and stop strings; a stop string that is a special token counts as a stop id.
      max_new_tokens: M.
      copies: sequences of each prompt, which follow one another.
      sparsity: for a batch of B · copies; None is the dense model.
      show: called with the new text of each row while it is made.

    Raises:
      InputError: a prompt is empty or too long, an option does not fit, or the device's memory runs out.
    """
    special = {each: tokenizer.special_id(each) for each in settings.stop_strings}
    stop_strings = [each for each, token in special.items() if token is None]
    stop_ids = settings.stop_ids + tuple(token for token in special.values() if token is not None)
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max(initial=0)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    batch = (model, jnp.asarray(tokens), jnp.asarray(lengths), key)
    options = {
        "sampler": settings.sampler,
        "max_new_tokens": max_new_tokens,
        "stop_ids": stop_ids,
        "repetition_penalty": settings.repetition_penalty,
        "num_return_sequences": copies,
        "sparsity": sparsity,
    }
    config = model.config
    room = positions(config, tokens.shape[1], max_new_tokens)
    dtype = model.dtype
    with explained_out_of_memory(config, batch_size=len(rows) * copies, cache_length=room, dtype=dtype):
        if show is None and not stop_strings:
            made = jax.block_until_ready(generate(*batch, **options))
            return complete(made, tokenizer, [row[-CONTEXT:] for row in rows for _ in range(copies)])
        texts = TextStream(stream(*batch, **options), tokenizer, stop_strings=stop_strings)
        for pieces in texts:
            if show is not None:
                show(pieces)
        return texts.completions
