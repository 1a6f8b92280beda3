"""Generation: the whole token loop on the device, for ragged batches."""

import functools

import jax

from polarjax.generation.batch import check_copies, check_new_tokens, check_stop_ids, prepare
from polarjax.generation.overlap import overlapping_jit
from polarjax.generation.sampling import Greedy, Sampler
from polarjax.generation.token_loop import Generation, decode_loop
from polarjax.model.cache import KVCache, init_cache
from polarjax.model.decoder import Decoder, decode_step, prefill
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Float, Implementation, Int, Key


@functools.partial(jax.jit, static_argnames=("capacity",))
def read_prompts(model: Decoder, tokens, lengths, *, capacity: int) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits after prompts of one bucket, and a cache of `capacity` positions with the prompts in it."""
    cache = init_cache(model.config, batch_size=tokens.shape[0], capacity=capacity, dtype=model.dtype)
    return prefill(model, tokens, lengths, cache)


@functools.partial(
    overlapping_jit,
    static_argnames=("sampler", "max_new_tokens", "stop_ids", "repetition_penalty", "implementation"),
    donate_argnames=("cache",),
)
def _write(model: Decoder, logits, cache: KVCache, key, sparsity, *, implementation, **settings):
    step = functools.partial(model_step, model, sparsity=sparsity, implementation=implementation)
    return decode_loop(step, logits, cache, key, **settings)


def model_step(model: Decoder, token, cache, live, *, sparsity, implementation):
    """A decoding step in the order of arguments that the token loop wants."""
    return decode_step(model, token, cache, sparsity=sparsity, live=live, implementation=implementation)


def generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: Key[Array, ""] | None = None,
    *,
    sampler: Sampler = Greedy(),
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    sparsity: Sparsity | None = None,
    implementation: Implementation = None,
) -> Generation:
    """Continues a right-padded batch of prompts: dense prefill, then (sparse) decoding, all on the device.

    Prompts are padded to a bucket (a power of two), and the compiled program is reused for any lengths inside it.

    Args:
      model: the decoder.
      tokens: prompts, int32 [B T]; what lies beyond `lengths` is ignored.
      lengths: valid tokens of each row, int32 [B], at least 1.
      key: random key; only a sampler that draws needs one.
      sampler: `Greedy()`, `Categorical(...)`, or any hashable `Sampler`.
      max_new_tokens: M; prompt and new tokens but the last, which is never read, fit into the model's positions.
      stop_ids: ids that end a row, 0 to 2**31 - 1.
      repetition_penalty: above 1, makes ids less likely that a row holds already, its prompt included.
      num_return_sequences: n; every prompt is continued n times, in rows that follow one another: B becomes n·B.
      sparsity: what to skip while decoding; None is the dense model.
      implementation: of the kernels; None takes the best for the device.

    Raises:
      InputError: empty or too long prompts, lengths outside [1, T], ids outside the vocabulary, stop ids that are
        none, several greedy sequences of one prompt.
      SparsityError: routers or plan are for another model.
    """
    max_new_tokens = check_new_tokens(max_new_tokens)
    settings = {"sampler": sampler, "max_new_tokens": max_new_tokens, "stop_ids": check_stop_ids(stop_ids)}
    prompts = prepare(
        model.config,
        tokens,
        lengths,
        max_new_tokens=max_new_tokens,
        copies=check_copies(num_return_sequences, sampler),
    )
    seen = prompts.seen(model.config.vocab_size, repetition_penalty)
    if sparsity is not None:
        sparsity.check(model.config)
    logits, cache = read_prompts(model, prompts.tokens, prompts.lengths, capacity=prompts.capacity)
    settings |= {"repetition_penalty": float(repetition_penalty), "seen": seen}
    return _write(model, logits, cache, key, sparsity, implementation=implementation, **settings)[0]
