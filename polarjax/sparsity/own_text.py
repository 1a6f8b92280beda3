"""Text that a model writes itself: what it was trained on, as far as it remembers."""

import jax
import jax.numpy as jnp
import numpy as np

from polarjax import costs
from polarjax.generation.checks import folded
from polarjax.generation.generate import generate
from polarjax.generation.sampling import Categorical
from polarjax.memory import device_memory, held_bytes
from polarjax.model.decoder import Decoder
from polarjax.progress import task
from polarjax.types import Array, Int32, Key

MOST_ROWS = 512


def own_windows(
    model: Decoder,
    count: int,
    length: int,
    key: Key[Array, ""],
    *,
    first: int | None,
    batch_size: int | None = None,
) -> Int32[np.ndarray, "n T"]:
    """Windows of `length` tokens drawn from the dense model at temperature 1, each after a random token.

    The random tokens make the windows differ from the start (LLM-QAT, arXiv 2305.17888, section 3.1, does so too).

    Args:
      model: the decoder.
      count: n, windows to write.
      length: T.
      key: random key.
      first: token that begins every window, such as BOS; None begins with the random token.
      batch_size: windows written at once; None is at most `MOST_ROWS`, as many as half of the free memory holds.
    """
    rows, batch_size = [], min(batch_size or _rows(model, length), count)
    vocab_size = model.config.vocab_size
    with task("write own text", count, "windows") as advance:
        for start in range(0, count, batch_size):
            keys = jax.random.split(folded(key, start))
            prompt = jax.random.randint(keys[0], (batch_size, 1), 0, vocab_size, jnp.int32)
            if first is not None:
                prompt = jnp.concatenate([jnp.full_like(prompt, first), prompt], 1)
            lengths = jnp.full((batch_size,), prompt.shape[1], jnp.int32)
            new = length - prompt.shape[1]
            drawn = generate(model, prompt, lengths, keys[1], sampler=Categorical(), max_new_tokens=new)
            rows.append(np.concatenate(jax.device_get([prompt, drawn.tokens]), 1))
            advance(min(batch_size, count - start))
    return np.concatenate(rows)[:count]


def _rows(model: Decoder, length: int) -> int:
    memory = device_memory()
    if memory is None:
        return MOST_ROWS // 2
    room = costs.weights_bytes(model.config, model.dtype) + (memory - held_bytes()) // 2
    fitting = costs.largest_batch(model.config, memory=room, cache_length=length, dtype=model.dtype)
    return max(1, min(MOST_ROWS, fitting))
