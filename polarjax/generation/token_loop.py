"""The token loop: draws, counts and stops; knows the model only as a step function. All traceable."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.errors import InputError
from polarjax.generation.logprobs import LogProbs, log_probs, no_log_probs
from polarjax.generation.sampling import Sampler
from polarjax.numeric import LARGEST
from polarjax.types import Array, Bool, Float, Int, Key

CHUNK = 8
"""Decoding steps between checks whether every sequence has stopped."""


def is_token_id(value: object) -> bool:
    """Whether a Python value can be a token id."""
    return type(value) is int and 0 <= value <= LARGEST


type StopIds = int | Sequence[int] | Int[Array, "*n"] | Int[np.ndarray, "*n"] | None
"""Token ids that end a row, as a caller gives them."""

type Step = Callable[[Int[Array, "B"], Any, Bool[Array, "B"]], tuple[Float[Array, "B V"], Any]]
"""A decoding step: (token [B], cache, live rows [B]) -> (logits [B V], cache); all that the loop knows about a
model."""

type Drawn = tuple[Int[Array, "B n"], LogProbs | None]
"""Tokens of several steps, and their log-probabilities."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """New tokens of a batch.

    Attributes:
      tokens: int32 [B M], the stop id included; 0 beyond `lengths`.
      lengths: tokens generated in each row, int32 [B].
      stopped: whether a row ended with a stop id, bool [B]; the others ran out of `max_new_tokens`, or failed.
      failed: whether a row ended because its logits were NaN or infinite, or its sampler drew an id outside the
        vocabulary, bool [B]; that draw is not among the tokens.
      logprobs: log-probabilities of the tokens, if asked for.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    failed: Bool[Array, "B"]
    logprobs: LogProbs | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoopState:
    """The token loop's state.

    Attributes:
      step: tokens drawn so far, int32 scalar.
      token: the latest token of each row, int32 [B].
      stopped: rows that have met a stop id, bool [B].
      failed: rows whose logits were not finite or whose draw was not an id, bool [B].
      lengths: tokens generated in each row, int32 [B].
      seen: ids in each row, including its prompt, bool [B V].
      cache: whatever the step function carries.
      logprobs: log-probabilities of the latest tokens, [B] and [B n]; None if not asked for.
    """

    step: Int[Array, ""]
    token: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    failed: Bool[Array, "B"]
    lengths: Int[Array, "B"]
    seen: Bool[Array, "B V"]
    cache: Any
    logprobs: LogProbs | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedSampler:
    """A caller-defined sampler, static under `jax.jit`."""

    sampler: Sampler = dataclasses.field(metadata={"static": True})

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""] | None) -> Int[Array, "B"]:
        """Draws int32 [B]."""
        return self.sampler(logits, key)


def _ids(drawn: Any, rows: int) -> Int[Array, "B"]:
    """A sampler's result; raises `InputError` unless it is one whole number per row."""
    dtype, shape = getattr(drawn, "dtype", None), tuple(getattr(drawn, "shape", ()))
    if dtype is None or shape != (rows,) or not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(
            "the sampler does not return one id for each row",
            where="sampler",
            got=repr(drawn)[:80] if dtype is None else f"{dtype}{list(shape)}",
            expected=f"int32[{rows}]",
            hint="return for example jnp.argmax(logits, -1)",
        )
    return jnp.asarray(drawn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """How a loop draws and when it ends: arrays, so that other settings reuse the program; one value for all rows, or
    one for each.

    Attributes:
      sampler: draws the tokens; a pytree.
      stop_ids: ids that end a row, int32 [n], or [B n] with each row's own; -1 is padding.
      limit: most tokens of a row, int32 scalar or [B].
      key: random key, or [B] with each row's own; only a sampler that draws needs one. Draw t of a row depends on its
        key and t alone if it has its own, otherwise on the row's number too.
      repetition_penalty: divides the positive logits of ids already in a row and multiplies the negative
        ones (Keskar et al. 2019), float32 scalar or [B]; 1 disables it.
      wants_logprobs: rows whose log-probabilities are wanted, bool [B]; None means all.
      best: how many likeliest tokens log-probabilities are given for; None for no log-probabilities.
    """

    sampler: Sampler
    stop_ids: Int[Array, "*B n"]
    limit: Int[Array, "*B"]
    key: Key[Array, "*B"] | None
    repetition_penalty: Float[Array, "*B"]
    wants_logprobs: Bool[Array, "B"] | None = None
    best: int | None = dataclasses.field(default=None, metadata={"static": True})

    def begin(self, logits: Float[Array, "B V"], cache: Any, seen: Bool[Array, "B V"]) -> LoopState:
        """The state after the first token, drawn from the logits that follow the prompts; `seen`: ids in them."""
        zeros = jnp.zeros(logits.shape[:1], jnp.int32)
        none = zeros.astype(bool)
        return self.draw(logits, LoopState(jnp.int32(0), zeros, none, none, zeros, seen, cache))

    def draw(self, logits: Float[Array, "B V"], state: LoopState) -> LoopState:
        """The state after one more token in every live row."""
        drawn = _ids(self.sampler(self._penalized(logits, state.seen), self._key(state)), logits.shape[0])
        # max propagates NaN; -inf next to finite logits is fine.
        usable = jnp.isfinite(jnp.max(logits, -1)) & (drawn >= 0) & (drawn < logits.shape[1])
        going = self.going(state)
        live = going & usable
        token = jnp.where(live, drawn.astype(jnp.int32), 0)
        rows = jnp.arange(token.shape[0])
        return LoopState(
            step=state.step + 1,
            token=token,
            stopped=state.stopped | (live & self._is_stop(token)),
            failed=state.failed | (going & ~usable),
            lengths=state.lengths + live.astype(jnp.int32),
            seen=state.seen.at[rows, jnp.where(live, token, logits.shape[1])].set(True, mode="drop"),
            cache=state.cache,
            logprobs=self._logprobs(logits, token, live),
        )

    def _key(self, state: LoopState) -> Key[Array, "*B"] | None:
        """The key of the next draw."""
        if self.key is None or not self.key.ndim or not jnp.issubdtype(self.key.dtype, jax.dtypes.prng_key):
            return None if self.key is None else jax.random.fold_in(self.key, state.step)
        return jax.vmap(jax.random.fold_in)(self.key, state.lengths)

    def _logprobs(self, logits, token, live) -> LogProbs | None:
        n = self.best
        if n is None:
            return None
        if self.wants_logprobs is None:
            return log_probs(logits, token, live, n)
        wanted = live & self.wants_logprobs
        compute = lambda logits: log_probs(logits, token, wanted, n)
        return jax.lax.cond(jnp.any(wanted), compute, lambda logits: no_log_probs(logits.shape[0], n), logits)

    def _penalized(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        penalty = self.repetition_penalty.astype(logits.dtype)
        penalty = penalty[:, None] if penalty.ndim else penalty
        return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def _is_stop(self, token: Int[Array, "B"]) -> Bool[Array, "B"]:
        ids = self.stop_ids if self.stop_ids.ndim == 2 else self.stop_ids[None]
        return jnp.any(token[:, None] == ids, -1)

    def halted(self, state: LoopState, rows: Bool[Array, "B"]) -> LoopState:
        """The state with these rows stopped as well."""
        return dataclasses.replace(state, stopped=state.stopped | rows)

    def going(self, state: LoopState) -> Bool[Array, "B"]:
        """The live rows."""
        return ~(state.stopped | state.failed) & (state.lengths < self.limit)

    def advance(self, step: Step, state: LoopState, count: int = CHUNK) -> tuple[LoopState, Drawn]:
        """Runs `count` more steps; returns what they drew too, 0 in rows that have ended."""

        def one(state: LoopState, _) -> tuple[LoopState, Drawn]:
            logits, cache = step(state.token, state.cache, self.going(state))
            state = self.draw(logits, dataclasses.replace(state, cache=cache))
            return state, (state.token, state.logprobs)

        state, drawn = jax.lax.scan(one, state, None, length=count)
        return state, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), drawn)


def ids_in(tokens: Int[Array, "B T"], lengths: Int[Array, "B"], vocab_size: int) -> Bool[Array, "B V"]:
    """The ids in each prompt. Traceable."""
    rows, width = tokens.shape
    valid = jnp.arange(width)[None] < lengths[:, None]
    ids = jnp.where(valid, tokens, vocab_size)  # outside: dropped
    none = jnp.zeros((rows, vocab_size), bool)
    return none.at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")


def decode_loop(
    step: Step,
    first_logits: Float[Array, "B V"],
    cache: Any,
    rules: Rules,
    seen: Bool[Array, "B V"],
    *,
    room: int,
) -> tuple[Generation, Any]:
    """Draws up to `rules.limit` tokens per row; returns them in [B room], and the final cache. Traceable.

    Steps run in chunks of `CHUNK`; between chunks the loop ends early once every row has ended.
    """
    chunks = max(1, -(-(room - 1) // CHUNK))  # a traced chunk needs its room even if it never runs
    state = rules.begin(first_logits, cache, seen)

    def widened(first: Array) -> Array:
        return (
            jnp.zeros((first.shape[0], 1 + chunks * CHUNK, *first.shape[1:]), first.dtype).at[:, 0].set(first)
        )

    def chunk(carry: tuple[LoopState, Drawn]) -> tuple[LoopState, Drawn]:
        before, output = carry
        state, drawn = rules.advance(step, before)
        write = lambda into, new: jax.lax.dynamic_update_slice_in_dim(into, new, before.step, 1)
        return state, jax.tree.map(write, output, drawn)

    output = jax.tree.map(widened, (state.token, state.logprobs))
    going = lambda carry: jnp.any(rules.going(carry[0]))
    state, output = jax.lax.while_loop(going, chunk, (state, output))
    tokens, logprobs = jax.tree.map(lambda leaf: leaf[:, :room], output)
    return Generation(tokens, state.lengths, state.stopped, state.failed, logprobs), state.cache
