"""The functional core: slots in one pytree of static shapes, and pure functions of it that can be jitted and donated."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from polarjax.generation.generate import model_step
from polarjax.generation.logprobs import LogProbs, no_log_probs
from polarjax.generation.sampling import Categorical
from polarjax.generation.token_loop import LoopState, Rules, ids_in
from polarjax.model.cache import KVCache, init_cache
from polarjax.model.chunks import Pieces, read_pieces
from polarjax.model.decoder import Decoder
from polarjax.model.layout import Layout
from polarjax.model.parallel import constrained
from polarjax.model.spread import copy_row
from polarjax.model.vocab_parts import vocab_divided
from polarjax.selection.selectors import Sparsity
from polarjax.types import Array, Bool, Implementation, Int, Key

STOP_IDS = 16
"""Most stop ids of a slot."""

MOST_LOGPROBS = 20
"""Most likeliest tokens that log-probabilities are given for."""

RUNNING, STOPPED, LENGTH, FAILED = range(4)
"""How a row is after a call: it goes on, or ended at a stop id, its limit, or unusable logits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """B rows, each of which holds a request or nothing. A row goes on while it is below its limit and hasn't ended.

    Attributes:
      rules: each row's sampler, stop ids [B n], limit [B] (0 for a row without a request), key [B], penalty [B].
      state: each row's latest token, tokens so far, how it ended, ids seen, and the cache.
    """

    rules: Rules
    state: LoopState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Pieces of prompts, and the settings of the requests that they belong to.

    Attributes:
      pieces: R pieces.
      last: whether a piece ends its prompt, bool [R]; its row draws its first token and goes on from there.
      seeds: of each piece's request, integers [R].
      rules: settings of each piece's request, all [R], without a key.
      begin: whether every piece is known to begin its prompt.
    """

    pieces: Pieces
    last: Bool[Array, "R"]
    seeds: Int[Array, "R"]
    rules: Rules
    begin: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """New tokens of every row.

    Attributes:
      tokens: int32 [B n].
      counts: how many of them each row has, int32 [B].
      ended: `RUNNING`, or why a row has ended, int32 [B].
      logprobs: of the rows that want them, else 0; None if the slots have none.
    """

    tokens: Int[Array, "B n"]
    counts: Int[Array, "B"]
    ended: Int[Array, "B"]
    logprobs: LogProbs | None


def make_slots(model: Decoder, slots: int, capacity: int) -> Slots:
    """B = `slots` rows without a request, each with S = `capacity` positions of cache. Traceable.

    Jitted with `keep_unused`, they are bound to the model's device if it is, like the slots that other programs return:
    so none is compiled for both.
    """
    B, config = slots, model.config
    zeros, ones = jnp.zeros(B, jnp.int32), jnp.ones(B, jnp.float32)
    none = jnp.zeros(B, bool)
    rules = Rules(
        sampler=Categorical.of_rows(ones, zeros + config.vocab_size, ones),
        stop_ids=jnp.full((B, STOP_IDS), -1, jnp.int32),
        limit=zeros,
        key=_keys(zeros),
        repetition_penalty=ones,
        wants_logprobs=none,
        best=min(MOST_LOGPROBS, config.vocab_size),
    )
    seen = jnp.zeros((B, config.vocab_size), bool)
    cache = init_cache(config, batch_size=B, capacity=capacity, dtype=model.dtype, layout=model.layout)
    logprobs = no_log_probs(B, rules.best or 0)
    made = Slots(rules, LoopState(jnp.int32(0), zeros, none, none, zeros, seen, cache, logprobs))
    return _placed(made, model.layout)


def _keys(seeds: Int[Array, "n"]) -> Key[Array, "n"]:
    """A random key for each seed, of the kind with which a row's draws don't depend on the other rows' keys: those of
    `jax_default_prng_impl="rbg"` do."""
    return jax.vmap(functools.partial(jax.random.key, impl="threefry2x32"))(seeds)


def _placed(slots: Slots, layout: Layout | None) -> Slots:
    """The slots, divided over the mesh of `layout` as the model's work is; the same after every program."""
    if layout is None:
        return slots
    cache, B = slots.state.cache, slots.rules.limit.shape[0]
    at = lambda spec: lambda leaf: constrained(layout, leaf, spec)
    rows = lambda leaf: at(PartitionSpec(*[layout.data] if leaf.shape[:1] == (B,) else []))(leaf)
    rest = jax.tree.map(rows, dataclasses.replace(slots, state=dataclasses.replace(slots.state, cache=None)))
    k, v = jax.tree.map(at(layout.cache_spec()), (cache.k, cache.v))
    seen = at(PartitionSpec(layout.data, layout.rules["vocab"]))(slots.state.seen)
    state = dataclasses.replace(rest.state, seen=seen, cache=KVCache(k, v, rows(cache.length)))
    return Slots(rest.rules, state)


def _whole[T](tree: T, layout: Layout | None) -> T:
    """What belongs to pieces, the same on all data shards, or XLA would divide it and exchange every array of it; ids
    seen [R V] lie like the vocabulary."""
    if layout is None:
        return tree
    vocab = PartitionSpec(None, layout.rules["vocab"])
    spec = lambda path: vocab if jax.tree_util.keystr(path) == ".seen" else PartitionSpec()
    put = lambda path, leaf: constrained(layout, leaf, spec(path))
    return jax.tree_util.tree_map_with_path(put, tree)


def read(model: Decoder, slots: Slots, reading: Reading) -> tuple[Slots, Drawn]:
    """Reads pieces into their rows; those of a prompt's last piece get their settings and first token. Traceable.

    Other rows stay as they are. A row that is being read doesn't go on, provided that its last request has ended.
    """
    reading, B = _whole(reading, model.layout), slots.rules.limit.shape[0]
    pieces = reading.pieces
    logits, cache = read_pieces(model, pieces, slots.state.cache, all_begin=reading.begin)
    seen = _seen(slots.state.seen, pieces)
    rules = dataclasses.replace(reading.rules, key=_keys(reading.seeds))
    with vocab_divided(model.layout, rows=False):
        begun = rules.begin(logits, None, seen[jnp.minimum(pieces.rows, B - 1)])
    begun = _whole(begun, model.layout)
    rows = jnp.where(reading.last, pieces.rows, B)
    put = lambda into, new: into.at[rows].set(new, mode="drop")
    others: Any = {"step": None, "seen": None, "cache": None}
    old, new = dataclasses.replace(slots.state, **others), dataclasses.replace(begun, **others)
    state = jax.tree.map(put, old, new)
    seen = seen.at[rows].set(begun.seen, mode="drop")
    state = dataclasses.replace(state, step=slots.state.step, seen=seen, cache=cache)
    slots = _placed(Slots(jax.tree.map(put, slots.rules, rules), state), model.layout)
    drew = jnp.zeros(B, jnp.int32).at[rows].set(begun.lengths, mode="drop")
    return slots, _drawn(
        slots, state.token[:, None], jax.tree.map(lambda x: x[:, None], state.logprobs), drew
    )


def share(
    slots: Slots,
    source: Int[Array, ""],
    target: Int[Array, ""],
    tokens: Int[Array, "S"],
    count: Int[Array, ""],
    *,
    layout: Layout | None,
) -> Slots:
    """Copies the first `count` of `tokens`, which row `source` holds, into row `target`, to read on there. Traceable."""
    state = slots.state
    k, v = copy_row((state.cache.k, state.cache.v), source, target, layout)
    cache = KVCache(k, v, state.cache.length.at[target].set(count))
    own = ids_in(tokens[None], count[None], state.seen.shape[1])[0]
    return dataclasses.replace(
        slots, state=dataclasses.replace(state, cache=cache, seen=state.seen.at[target].set(own))
    )


def decode(
    model: Decoder,
    slots: Slots,
    halted: Bool[Array, "B"],
    *,
    steps: int,
    sparsity: Sparsity | None = None,
    implementation: Implementation = None,
) -> tuple[Slots, Drawn]:
    """Runs `steps` decoding steps of all rows that go on, after ending the `halted` ones. Traceable.

    Rows that don't go on read no cache and have no say in the choice of neurons.
    """
    step = functools.partial(model_step, model, sparsity=sparsity, implementation=implementation)
    state = free(slots, halted).state
    with vocab_divided(model.layout):
        after, (tokens, logprobs) = slots.rules.advance(step, state, steps)
    slots = _placed(Slots(slots.rules, after), model.layout)
    return slots, _drawn(slots, tokens, logprobs, after.lengths - state.lengths)


def free(slots: Slots, rows: Bool[Array, "B"]) -> Slots:
    """Ends these rows; the next prompt that is read into one begins anew. Traceable."""
    return dataclasses.replace(slots, state=slots.rules.halted(slots.state, rows))


def _drawn(slots: Slots, tokens, logprobs, counts) -> Drawn:
    state = slots.state
    ended = jnp.where(state.lengths >= slots.rules.limit, LENGTH, RUNNING)
    ended = jnp.where(state.stopped, STOPPED, ended)
    return Drawn(tokens, counts, jnp.where(state.failed, FAILED, ended).astype(jnp.int32), logprobs)


def _seen(seen: Bool[Array, "B V"], pieces: Pieces) -> Bool[Array, "B V"]:
    """The ids in each row after the pieces, whose first ones forget the row's last request."""
    B, V = seen.shape
    seen = seen.at[jnp.where(pieces.start == 0, pieces.rows, B)].set(False, mode="drop")
    valid = jnp.arange(pieces.tokens.shape[1], dtype=jnp.int32)[None] < pieces.counts[:, None]
    ids = jnp.where(valid, pieces.tokens, V)
    return seen.at[pieces.rows[:, None], ids].set(True, mode="drop")
