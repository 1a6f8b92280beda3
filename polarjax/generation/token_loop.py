"""The token loop: draws, counts and stops, knowing nothing of the model but a step function. All traceable."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from polarjax.generation.sampling import Sampler
from polarjax.types import Array, Bool, Float, Int, Key

CHUNK = 8
"""Decoding steps between two looks at whether every sequence has stopped."""

LARGEST_ID = 2**31 - 1
"""The largest token id there can be: ids are int32."""


def is_token_id(value: object) -> bool:
    """Whether a value, a Python number if it is one, can be a token's id."""
    return type(value) is int and 0 <= value <= LARGEST_ID


type Step = Callable[[Int[Array, "B"], Any, Bool[Array, "B"]], tuple[Float[Array, "B V"], Any]]
"""A decoding step: (token [B], cache, rows that go on [B]) -> (logits [B V], cache); all that the loop knows of a
model."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of a batch.

    Attributes:
      tokens: int32 [B M], the stop id included; 0 beyond `lengths`.
      lengths: tokens generated in each row, int32 [B].
      stopped: whether a row ended with a stop id, bool [B]; the others ran out of `max_new_tokens`, or failed.
      failed: whether a row ended because its logits were NaN or infinite, bool [B]; nothing was drawn from them.
    """

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    failed: Bool[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """What the token loop carries.

    Attributes:
      step: tokens drawn so far, int32 scalar.
      token: the latest token of each row, int32 [B].
      stopped: rows that have met a stop id, bool [B].
      failed: rows whose logits were not finite, bool [B].
      lengths: tokens generated in each row, int32 [B].
      seen: ids that each row holds, its prompt included, bool [B V]; None where nothing asks for them.
      cache: whatever the step function carries.
    """

    step: Int[Array, ""]
    token: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    failed: Bool[Array, "B"]
    lengths: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None
    cache: Any


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a loop draws and when it ends.

    Attributes:
      sampler: draws the tokens.
      stop_ids: ids that end a row.
      limit: most tokens of a row; an int, or an int32 scalar that may be traced.
      key: random key; only a sampler that draws needs one.
      repetition_penalty: divides the positive logits of ids that a row holds already and multiplies the negative
        ones (Keskar et al. 2019); 1 is none.
    """

    sampler: Sampler
    stop_ids: tuple[int, ...]
    limit: int | Int[Array, ""]
    key: Key[Array, ""] | None
    repetition_penalty: float = 1.0

    def begin(self, logits: Float[Array, "B V"], cache: Any, seen: Bool[Array, "B V"] | None) -> LoopState:
        """The state after the first token, drawn from the logits that follow the prompts; `seen`: ids in them."""
        zeros = jnp.zeros(logits.shape[:1], jnp.int32)
        none = zeros.astype(bool)
        return self.draw(logits, LoopState(jnp.int32(0), zeros, none, none, zeros, seen, cache))

    def draw(self, logits: Float[Array, "B V"], state: LoopState) -> LoopState:
        """The state after a token more in every row that goes on."""
        key = None if self.key is None else jax.random.fold_in(self.key, state.step)
        drawn = self.sampler(self._penalised(logits, state.seen), key)
        finite = jnp.isfinite(
            jnp.max(logits, -1)
        )  # a maximum hands NaN on; -inf beside finite logits is fine
        going = ~state.stopped & ~state.failed & (state.step < self.limit)
        live = going & finite
        token = jnp.where(live, drawn, 0)
        return LoopState(
            step=state.step + 1,
            token=token,
            stopped=state.stopped | (live & _is_stop(token, self.stop_ids)),
            failed=state.failed | (going & ~finite),
            lengths=state.lengths + live.astype(jnp.int32),
            seen=None if state.seen is None else state.seen.at[jnp.arange(token.shape[0]), token].set(True),
            cache=state.cache,
        )

    def _penalised(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        if seen is None:
            return logits
        lower = jnp.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
        return jnp.where(seen, lower, logits)

    def halted(self, state: LoopState, rows: Bool[Array, "B"]) -> LoopState:
        """The state in which these rows have stopped too."""
        return dataclasses.replace(state, stopped=state.stopped | rows)

    def unfinished(self, state: LoopState) -> Bool[Array, ""]:
        """Whether any row goes on."""
        return (state.step < self.limit) & ~jnp.all(state.stopped | state.failed)

    def advance(self, step: Step, state: LoopState) -> tuple[LoopState, Int[Array, "B CHUNK"]]:
        """`CHUNK` steps more, and the tokens they drew; 0 in rows that have ended."""

        def one(state: LoopState, _) -> tuple[LoopState, Int[Array, "B"]]:
            logits, cache = step(state.token, state.cache, ~(state.stopped | state.failed))
            state = self.draw(logits, dataclasses.replace(state, cache=cache))
            return state, state.token

        state, tokens = jax.lax.scan(one, state, None, length=CHUNK)
        return state, tokens.T


def decode_loop(
    step: Step,
    first_logits: Float[Array, "B V"],
    cache: Any,
    key: Key[Array, ""] | None,
    *,
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    repetition_penalty: float = 1.0,
    seen: Bool[Array, "B V"] | None = None,
) -> tuple[Generation, Any]:
    """Draws up to `max_new_tokens` tokens a row; returns them and the final cache. Traceable.

    Steps run in chunks of `CHUNK`; between chunks the loop ends early once every row has ended.
    """
    rules = Rules(sampler, stop_ids, max_new_tokens, key, repetition_penalty)
    chunks = max(1, -(-(max_new_tokens - 1) // CHUNK))  # a traced chunk needs its room even if it never runs
    state = rules.begin(first_logits, cache, seen)
    output = jnp.zeros((first_logits.shape[0], 1 + chunks * CHUNK), jnp.int32).at[:, 0].set(state.token)

    def chunk(carry: tuple[LoopState, Array]) -> tuple[LoopState, Array]:
        before, output = carry
        state, tokens = rules.advance(step, before)
        column = (jnp.zeros_like(before.step), before.step)
        return state, jax.lax.dynamic_update_slice(output, tokens, column)

    going = lambda carry: rules.unfinished(carry[0])
    state, output = jax.lax.while_loop(going, chunk, (state, output))
    done = Generation(output[:, :max_new_tokens], state.lengths, state.stopped, state.failed)
    return done, state.cache


def _is_stop(token: Int[Array, "B"], stop_ids: tuple[int, ...]) -> Bool[Array, "B"]:
    if not stop_ids:
        return jnp.zeros(token.shape, bool)
    return jnp.any(token[:, None] == jnp.asarray(stop_ids, jnp.int32)[None], -1)
