"""How many neurons each layer must keep at each batch size: exact, without a search."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.generation.checks import random_key
from polarjax.model.taps import unpack
from polarjax.progress import task
from polarjax.selection.plans import PlanTable, check_density, dense_above
from polarjax.selection.routers import Routers
from polarjax.sparsity.activations import Activations, Part
from polarjax.sparsity.checks import check_options, check_plans, check_routers
from polarjax.sparsity.options import CalibrateOptions
from polarjax.types import Array, Bool, Float, Int, Key


def calibrate(
    activations: Activations,
    routers: Routers,
    config: ModelConfig,
    *,
    key: Key[Array, ""],
    head_density: float = 0.5,
    options: CalibrateOptions | None = None,
) -> PlanTable:
    """The smallest k for each batch size and layer whose recall on validation tokens reaches the target.

    For random batches of B tokens the truth is what any of them makes active; the router's choice is ranked as
    decoding ranks it (the sum over the batch of its positive scores, ties to the lower index), and the rank of
    every true neuron gives the recall at all k at once. A layer that needs more than `dense_above`'s share, or is
    dense at a smaller batch size, is dense (None); k never falls as B grows. Models that are not ReLU are dense
    throughout.

    Args:
      activations: of this model, with a validation part of at least the largest batch size.
      routers: trained.
      config: the model's configuration.
      key: random key of the batches.
      head_density: the table's default density of groups.
      options: the published ones when None.

    Raises:
      SparsityError: activations or routers of another model, or a bad density.
      InputError: too few validation tokens.
    """
    options = check_options(options, CalibrateOptions, "options")
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
    return PlanTable(
        num_layers=config.num_layers,
        num_neurons=config.d_ff,
        num_groups=config.num_kv_heads,
        batch_sizes=options.batch_sizes,
        neurons=tuple(tuple(k for k, _ in row) for row in zip(*layers, strict=True)),
        recall=tuple(tuple(recall for _, recall in row) for row in zip(*layers, strict=True)),
        head_density=head_density,
        dense_layers=dense_layers,
        weights=activations.fingerprint,
        routers=routers.fingerprint,
    )


def dense_layer(activations: Activations, options: CalibrateOptions) -> int:
    """The layer whose attention keeps all groups."""
    return 0 if options.dense_attention == "first" else int(np.argmax(activations.attention_importance()))


def _calibrate_layer(
    held_out: "HeldOut", layer: int, options: CalibrateOptions, advance: Callable[..., None]
) -> list[tuple[int | None, float]]:
    """(k, recall) of one layer at each batch size; nothing is computed beyond the first that is dense."""
    data, k = held_out.layer(layer), 1
    column: list[tuple[int | None, float]] = []
    for size in options.batch_sizes:
        curve = held_out.curve(data, size)
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
    """The recall that a calibrated table reaches on other tokens: for each batch size of the table, each layer's.

    Args:
      activations: of the same model.
      routers: those that the table was calibrated for.
      table: the plans.
      key: random key of the batches.
      part: of the activations, None for all of them.
      options: only `num_batches` and `max_tokens` matter.

    Raises:
      SparsityError: routers, plans and activations are not of one model.
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
                recall[i, layer] = 1.0 if k is None else held_out.curve(data, size)[k - 1]
    return tuple(map(tuple, recall.tolist()))


class HeldOut:
    """Random batches of held-out tokens, of several sizes, and the recall that routers reach on them.

    Attributes:
      rows: of the activations, those used [n].
      batches: by size B, which of these rows make up each batch, int32 [num_batches B].
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
                hint="collect from a longer text, hold out more of it, or leave out the large batch sizes",
            )
        drawn = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
        self.rows = np.sort(drawn.permutation(rows)[: max(options.max_tokens, sizes[-1])])
        self.batches = {
            size: random_batches(drawn, len(self.rows), size, options.num_batches) for size in sizes
        }
        self._activations, self._routers = activations, routers

    def layer(self, layer: int) -> tuple[Float[Array, "n F"], Bool[Array, "n F"]]:
        """Positive parts of the router's scores (what decoding sums over a batch), and what was active."""
        one = slice(layer, layer + 1)
        inputs = jnp.asarray(self._activations.router_inputs(self.rows, one)[0])
        packed = jnp.asarray(self._activations.records("activity", self.rows, one)[0])
        scores = jnp.maximum(self._routers.neuron_scores(layer, inputs), 0)
        return scores, unpack(packed, self._activations.config.d_ff)

    def curve(
        self, layer: tuple[Float[Array, "n F"], Bool[Array, "n F"]], size: int
    ) -> Float[np.ndarray, "F"]:
        """Mean recall of one layer at a batch size: entry k - 1 is the recall of the k best neurons."""
        return np.asarray(_recall_curve(*_union(*layer, self.batches[size])))


def random_batches(
    drawn: np.random.Generator, tokens: int, size: int, count: int
) -> Int[np.ndarray, "count size"]:
    """Random batches of `size` different tokens: all tokens are cut into batches, over and over as needed."""
    each = tokens // size
    cuts = [drawn.permutation(tokens)[: each * size].reshape(each, size) for _ in range(-(-count // each))]
    return np.concatenate(cuts)[:count].astype(np.int32)


@jax.jit
def _union(
    scores: Float[Array, "n F"], active: Bool[Array, "n F"], index: Int[Array, "g B"]
) -> tuple[Float[Array, "g F"], Bool[Array, "g F"]]:
    """Each batch's summed scores, and which neurons any of its tokens makes active."""
    return jax.lax.map(lambda rows: (jnp.sum(scores[rows], 0), jnp.any(active[rows], 0)), index)


@jax.jit
def _recall_curve(scores: Float[Array, "g F"], truth: Bool[Array, "g F"]) -> Float[Array, "F"]:
    """Mean over batches of the recall at k = 1 … F; a batch with nothing active has recall 1."""

    def one(batch: tuple[Array, Array]) -> Array:
        order = jnp.argsort(-batch[0], stable=True)
        found = jnp.cumsum(batch[1][order], dtype=jnp.int32)
        return jnp.where(found[-1] > 0, found / jnp.maximum(found[-1], 1), 1.0)

    return jnp.mean(jax.lax.map(one, (scores, truth)), 0)


def choose(curve: np.ndarray, smallest: int, batch_size: int, options: CalibrateOptions) -> int | None:
    """k of one layer: the first to reach the target, rounded up, not below `smallest`; None where dense."""
    width = len(curve)
    enough = curve >= options.target_recall
    reached = int(np.argmax(enough)) + 1 if enough.any() else width  # a mean of ones may fall short of one
    rounded = min(-(-reached // options.multiple) * options.multiple, width)
    k = max(rounded, smallest)
    return None if k > dense_above(batch_size) * width else k
