"""Computes how many neurons each layer must keep at each batch size: exactly, without a search."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.generation.checks import random_key
from polarjax.model.meshes import without_mesh
from polarjax.model.taps import unpack
from polarjax.progress import task
from polarjax.selection.plans import PlanTable, check_density, dense_above
from polarjax.selection.routers import LayerRouter, Routers
from polarjax.sparsity.activations import Activations, Part
from polarjax.sparsity.checks import check_options, check_plans, check_routers
from polarjax.sparsity.options import CalibrateOptions
from polarjax.sparsity.shards import ranked_by_block, with_group_order
from polarjax.types import Array, Bool, Float, Int, Key, UInt8

_TOKENS = 1024


@without_mesh()
def calibrate(
    activations: Activations,
    routers: Routers,
    config: ModelConfig,
    *,
    key: Key[Array, ""],
    head_density: float = 0.5,
    options: CalibrateOptions | None = None,
) -> PlanTable:
    """Finds the smallest k, for each batch size and layer, whose recall on validation tokens reaches the target.

    In a random batch of B tokens, a neuron is truly active if any of the tokens activates it. Neurons are ranked
    as in decoding (by the sum over the batch of positive scores, ties to the lower index), and the ranks of the
    truly active ones give the recall at every k at once. A layer is dense (None) if it needs more than the
    fraction `dense_above(B)`, or is dense at a smaller batch size; k never decreases as B grows. All layers of
    models without ReLU are dense.

    Args:
      activations: this model's, with at least as many validation tokens as the largest batch size.
      routers: the trained routers.
      config: the model's configuration.
      key: random key that draws the batches.
      head_density: the table's default head density.
      options: None means the published ones.

    Raises:
      SparsityError: activations or routers are from another model, or the density is not in (0, 1].
      InputError: too few validation tokens.
    """
    options = check_options(options, CalibrateOptions, "options")
    options.check(config)
    check_routers(routers, activations, config)
    check_density(head_density, where="head density")
    key = random_key(key)
    dense_layers = (dense_layer(activations, options),)
    layers = [[(None, 1.0)] * len(options.batch_sizes)] * config.num_layers
    if config.neuron_sparsity:
        held_out = HeldOut(activations, routers, key, sizes=options.batch_sizes, options=options)
        with task("calibrate", config.num_layers, "layers") as advance:
            layers = [
                _calibrate_layer(held_out, layer, options, advance) for layer in range(config.num_layers)
            ]
    plans = PlanTable(
        num_layers=config.num_layers,
        num_neurons=config.d_ff,
        num_groups=config.num_kv_heads,
        batch_sizes=options.batch_sizes,
        neurons=tuple(tuple(k for k, _ in row) for row in zip(*layers, strict=True)),
        recall=tuple(tuple(recall for _, recall in row) for row in zip(*layers, strict=True)),
        head_density=head_density,
        dense_layers=dense_layers,
        neuron_shards=options.shards,
        group_shards=options.shards if options.attention == "groups" else 1,
        weights=activations.fingerprint,
        routers=routers.fingerprint,
    )
    return with_group_order(activations, routers, plans)


def dense_layer(activations: Activations, options: CalibrateOptions) -> int:
    """The layer whose attention keeps all groups."""
    return 0 if options.dense_attention == "first" else int(np.argmax(activations.attention_importance()))


def _calibrate_layer(
    held_out: "HeldOut", layer: int, options: CalibrateOptions, advance: Callable[..., None]
) -> list[tuple[int | None, float]]:
    """(k, recall) of one layer at each batch size; stops computing at the first that is dense."""
    data, k = held_out.layer(layer), 1
    column: list[tuple[int | None, float]] = []
    for size in options.batch_sizes:
        curve = held_out.curve(data, size, options.shards)
        k = choose(curve, k, size, options)
        if k is None:
            break
        column.append((k, float(curve[k - 1])))
    column += [(None, 1.0)] * (len(options.batch_sizes) - len(column))
    advance()
    return column


def measure_recall(
    activations: Activations,
    routers: Routers,
    table: PlanTable,
    *,
    key: Key[Array, ""],
    part: Part | None = "test",
    options: CalibrateOptions | None = None,
) -> tuple[tuple[float, ...], ...]:
    """Measures the recall of a calibrated table on other tokens; returns it by batch size, then layer.

    Args:
      activations: the same model's.
      routers: the routers that the table was calibrated for.
      table: the plans.
      key: random key that draws the batches.
      part: the part of the activations to use; None means all.
      options: only `num_batches` and `max_tokens` matter.

    Raises:
      SparsityError: routers, plans and activations are not from the same model.
      InputError: fewer tokens than the largest batch size at which a layer is sparse.
    """
    config = activations.config
    check_plans(table, routers, activations)
    recall = np.ones((len(table.batch_sizes), config.num_layers))
    wanted = [
        (i, layer) for i, row in enumerate(table.neurons) for layer, k in enumerate(row) if k is not None
    ]
    if wanted:
        sizes = table.batch_sizes[: max(wanted)[0] + 1]
        held_out = HeldOut(activations, routers, key, sizes=sizes, options=options, part=part)
        for layer in sorted({layer for _, layer in wanted}):
            data = held_out.layer(layer)
            for i, size in enumerate(sizes):
                k = table.neurons[i][layer]
                recall[i, layer] = (
                    1.0 if k is None else held_out.curve(data, size, table.neuron_shards)[k - 1]
                )
    return tuple(map(tuple, recall.tolist()))


class HeldOut:
    """Random batches of held-out tokens, in several sizes, and the recall of routers on them.

    Attributes:
      rows: rows of the activations that are used [n].
      batches: for each size B, indices into `rows`, int32 [num_batches B].
    """

    def __init__(
        self,
        activations: Activations,
        routers: Routers,
        key: Key[Array, ""],
        *,
        sizes: tuple[int, ...],
        options: CalibrateOptions | None = None,
        part: Part | None = "validation",
    ):
        options = options or CalibrateOptions()
        rows = activations.rows(part)
        if len(rows) < sizes[-1]:
            raise InputError(
                "too few held-out tokens for the largest batch size",
                where=f"the {part} part of the activations" if part else "activations",
                got=f"{len(rows)} tokens",
                expected=f"at least {sizes[-1]}",
                hint="collect from a longer text, hold out more of it, or drop the large batch sizes",
            )
        drawn = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
        self.rows = np.sort(drawn.permutation(rows)[: max(options.max_tokens, sizes[-1])])
        self.batches = {
            size: random_batches(drawn, len(self.rows), size, options.num_batches) for size in sizes
        }
        self._activations, self._routers = activations, routers

    def layer(self, layer: int) -> tuple[Float[Array, "n F"], Bool[Array, "n F"]]:
        """Positive parts of the router's scores, which decoding sums over a batch, and which neurons were active."""
        one = slice(layer, layer + 1)
        inputs = jax.device_put(self._activations.router_inputs(self.rows, one)[0])
        packed = jax.device_put(self._activations.records("activity", self.rows, one)[0])
        return _scored(self._routers.layers[layer], inputs, packed, self._activations.config.d_ff)

    def curve(
        self, layer: tuple[Float[Array, "n F"], Bool[Array, "n F"]], size: int, shards: int = 1
    ) -> Float[np.ndarray, "F"]:
        """Mean recall of one layer at a batch size; entry k - 1 is the recall of the top k neurons.

        With several shards, these are the top k / shards of each, if k is a multiple of `shards`.
        """
        batches = jax.device_put(self.batches[size])
        return jax.device_get(_recall_curve(*_union(*layer, batches), shards))


def random_batches(
    drawn: np.random.Generator, tokens: int, size: int, count: int
) -> Int[np.ndarray, "count size"]:
    """Random batches of `size` different tokens; shuffles all tokens and cuts them, again if more are needed."""
    each = tokens // size
    cuts = [drawn.permutation(tokens)[: each * size].reshape(each, size) for _ in range(-(-count // each))]
    return np.concatenate(cuts)[:count].astype(np.int32)


@functools.partial(jax.jit, static_argnames="num_neurons")
def _scored(
    router: LayerRouter, inputs: Float[Array, "n D"], packed: UInt8[Array, "n bytes"], num_neurons: int
) -> tuple[Float[Array, "n F"], Bool[Array, "n F"]]:
    """A few tokens at a time: XLA tries its algorithms for a product on results of their own, beside what is kept."""
    n = inputs.shape[0]
    count = min(_TOKENS, n)

    def some(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        first = i * count  # the last slice is moved to the end, and overlaps the one before
        x, bits = (jax.lax.dynamic_slice_in_dim(rows, first, count) for rows in (inputs, packed))
        new = jnp.maximum(Routers((router,)).neuron_scores(0, x), 0), unpack(bits, num_neurons)
        put = jax.lax.dynamic_update_slice_in_dim
        return put(found[0], new[0], first, 0), put(found[1], new[1], first, 0)

    empty = jnp.zeros((n, num_neurons), jnp.float32), jnp.zeros((n, num_neurons), bool)
    return jax.lax.fori_loop(0, -(-n // count), some, empty)


@jax.jit
def _union(
    scores: Float[Array, "n F"], active: Bool[Array, "n F"], index: Int[Array, "g B"]
) -> tuple[Float[Array, "g F"], Bool[Array, "g F"]]:
    """Each batch's summed scores, and which neurons any of its tokens activates."""
    return jax.lax.map(lambda rows: (jnp.sum(scores[rows], 0), jnp.any(active[rows], 0)), index)


@functools.partial(jax.jit, static_argnames="shards")
def _recall_curve(scores: Float[Array, "g F"], truth: Bool[Array, "g F"], shards: int) -> Float[Array, "F"]:
    """Mean over batches of the recall at k = 1 … F; a batch without active neurons has recall 1."""

    def one(batch: tuple[Array, Array]) -> Array:
        order = ranked_by_block(batch[0], shards)
        found = jnp.cumsum(batch[1][order], dtype=jnp.int32)
        return jnp.where(found[-1] > 0, found / jnp.maximum(found[-1], 1), 1.0)

    return jnp.mean(jax.lax.map(one, (scores, truth)), 0)


def choose(curve: np.ndarray, smallest: int, batch_size: int, options: CalibrateOptions) -> int | None:
    """One layer's k: the first that reaches the target, rounded up, at least `smallest`; None if dense."""
    width, multiple = len(curve), math.lcm(options.multiple, options.shards)
    enough = curve >= options.target_recall
    reached = int(np.argmax(enough)) + 1 if enough.any() else width  # a mean of ones may fall short of one
    rounded = min(-(-reached // multiple) * multiple, width)
    k = max(rounded, smallest)
    return None if k > dense_above(batch_size) * width else k
