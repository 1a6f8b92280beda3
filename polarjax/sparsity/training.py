"""Trains routers on recorded activations, all layers in one vmapped step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polarjax.configs import ModelConfig
from polarjax.errors import InputError, SparsityError
from polarjax.generation.checks import random_key
from polarjax.model.meshes import without_mesh
from polarjax.numeric import check_flags
from polarjax.progress import task as progress
from polarjax.selection.plans import check_density, groups_kept
from polarjax.selection.routers import LayerRouter, Routers, init_routers
from polarjax.sparsity.activations import Activations
from polarjax.sparsity.checks import check_options, check_sources, diverged
from polarjax.sparsity.early_stopping import Best
from polarjax.sparsity.minibatches import Feed, read
from polarjax.sparsity.objectives import (
    GroupTask,
    NeuronTask,
    Task,
    Weights,
    count,
    loss,
    weights_of,
)
from polarjax.sparsity.options import TrainOptions
from polarjax.types import Array, Float, Int, Key, Num

EVALUATION_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Quality:
    """How well one kind of router does on the validation tokens; one entry per layer.

    Attributes:
      recall, precision, f1: micro-averaged; positive means a logit of at least 0 (if importance is predicted: selected).
      selected: fraction of the positives that would be selected: the top k for groups; for neurons, whose k depends
        on the batch size, those with a logit of at least 0 (so it equals the recall).
      captured: the same, with each group weighted by its squared importance.
      epoch: the epoch whose weights were kept, from 1.
    """

    recall: tuple[float, ...]
    precision: tuple[float, ...]
    f1: tuple[float, ...]
    selected: tuple[float, ...]
    captured: tuple[float, ...]
    epoch: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """Result of a training, measured with the routers in the model's dtype.

    A layer's best epoch is picked by f1 for neurons and by `captured` for groups (`selected` if the objective is
    "top"), not by recall at a threshold, because predicting everything would maximize that.
    """

    neurons: Quality | None
    groups: Quality
    train_tokens: int
    validation_tokens: int
    head_density: float

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)


@without_mesh()
@jax.transfer_guard("allow")  # it moves what it reads from the disk, and what it measures, by design
def train_routers(
    activations: Activations,
    config: ModelConfig,
    key: Key[Array, ""],
    *,
    head_density: float = 0.5,
    neurons: bool | None = None,
    options: TrainOptions | None = None,
) -> tuple[Routers, TrainReport]:
    """Trains routers to predict, in every layer, the active neurons (ReLU models) and the most important groups.

    Training is in float32; the returned routers are in the model's dtype. They rank groups by what the activations
    recorded, and replace skipped groups by the recorded means, if there are any.

    Args:
      activations: this model's, with a train and a validation part.
      config: the model's configuration.
      key: random key for the initial weights and the order of tokens.
      head_density: a token's `floor(head_density * K)` most important groups are the positives.
      neurons: whether to train neuron routers too; None means for ReLU models only.
      options: None means the defaults.

    Raises:
      SparsityError: activations from another model, a density not in (0, 1], or diverging training.
      InputError: there are no train or no validation tokens.
    """
    check_sources(activations, config, "train_routers")
    options = check_options(options, TrainOptions, "options")
    if neurons is not None:
        check_flags("train_routers", neurons=neurons)
    key = random_key(key)
    density = check_density(head_density, where="head density")
    activations.check(config)
    if neurons and not config.neuron_sparsity:
        hint = "drop neurons=True: only ReLU neurons are exactly zero"
        raise SparsityError(
            "neuron routers need a ReLU model", where="train_routers", got=config.activation, hint=hint
        )
    for part in ("train", "validation"):
        if len(activations.rows(part)) == 0:
            hint = "collect with validation text held out (held_out, --validation)"
            raise InputError(f"the activations have no {part} tokens", where="train_routers", hint=hint)
    initial_key, neuron_key, group_key = jax.random.split(key, 3)
    neurons = config.neuron_sparsity if neurons is None else neurons
    initial = _stack(init_routers(config, initial_key, rank=options.rank, neurons=neurons))
    kept = groups_kept(density, config.num_kv_heads)
    groups = GroupTask(kept, options.group_objective)
    weights, quality = fit(groups, weights_of(groups, initial), activations, group_key, options)
    neuron_quality = None
    if neurons:
        task = NeuronTask(config.d_ff)
        found, neuron_quality = fit(task, weights_of(task, initial), activations, neuron_key, options)
        weights |= found
    report = TrainReport(
        neuron_quality, quality, len(activations.rows("train")), len(activations.rows("validation")), density
    )
    return _routers(dataclasses.replace(initial, **weights), activations), report


def fit(
    task: Task, weights: Weights, activations: Activations, key: Key[Array, ""], options: TrainOptions
) -> tuple[Weights, Quality]:
    """Trains stacked float32 weights [L …]; returns each layer's best, in the model's dtype, and their quality."""
    batch = options.neuron_batch if isinstance(task, NeuronTask) else options.group_batch
    feed = Feed(activations, task, activations.rows("train"), batch=batch, memory_bytes=options.memory_bytes)
    order = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), jnp.uint32)))
    good_enough = (
        1.0 if task.criterion == "captured" else options.good_enough
    )  # groups of similar importance reach .99 at once
    limits: dict[str, Any] = {"patience": options.patience, "good_enough": good_enough}
    best, weights = Best.start(weights), jax.tree.map(jnp.copy, weights)  # the copy is donated to each step
    optimizer_state = jax.vmap(_optimizer(options).init)(weights)
    with progress(f"train {task.name}", options.max_epochs, "epochs") as advance:
        for epoch in range(1, options.max_epochs + 1):
            for piece in feed.epoch(order):
                weights, optimizer_state, losses = _steps(task, options, weights, optimizer_state, *piece)
                _check_finite(losses, options)
                piece = None  # so that the next one isn't on the device beside it
            measured = getattr(measure(task, weights, activations), task.criterion)
            best = best.update(weights, np.asarray(measured), epoch, **limits)
            if best.done.all():
                advance(options.max_epochs + 1 - epoch, best.note(task))
                break
            advance(note=best.note(task))
    served = {name: value.astype(activations.dtype) for name, value in best.weights.items()}
    quality = measure(task, served, activations)
    return served, dataclasses.replace(quality, epoch=tuple(best.epoch.tolist()))


def _optimizer(options: TrainOptions) -> optax.GradientTransformation:
    return optax.adamw(options.learning_rate, weight_decay=options.weight_decay)


@functools.partial(jax.jit, static_argnames=("task", "options"), donate_argnames=("weights", "state"))
def _steps(
    task: Task,
    options: TrainOptions,
    weights: Weights,
    state: optax.OptState,
    inputs: Float[Array, "L m D"],
    records: Num[Array, "L m n"],
    order: Int[Array, "steps b"],
) -> tuple[Weights, optax.OptState, Float[Array, "L"]]:
    """Runs one step of every layer for each row of `order`; also returns the mean losses."""
    optimizer = _optimizer(options)

    def layer_step(weights: Weights, state: optax.OptState, x: Array, record: Array):
        value, gradient = jax.value_and_grad(functools.partial(loss, task))(
            weights, x.astype(jnp.float32), record
        )
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            change, state = optimizer.update(gradient, state, weights)
            weights = cast(Weights, optax.apply_updates(weights, change))
        return weights, state, value

    def step(carry, rows):
        weights, state = carry
        weights, state, value = jax.vmap(layer_step)(weights, state, inputs[:, rows], records[:, rows])
        return (weights, state), value

    (weights, state), values = jax.lax.scan(step, (weights, state), order)
    return weights, state, jnp.mean(values, 0)


def measure(task: Task, weights: Weights, activations: Activations) -> Quality:
    """Measures stacked weights [L …] on the validation tokens, in the dtype of the weights."""
    rows = activations.rows("validation")
    totals: dict[str, np.ndarray] = {}
    for start in range(0, len(rows), EVALUATION_ROWS):
        block = np.resize(rows[start : start + EVALUATION_ROWS], min(len(rows), EVALUATION_ROWS))
        real = np.arange(len(block)) < len(rows) - start
        inputs, records = read(activations, task, block)
        for name, value in _counts(task, weights, inputs, records, real).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    ratio = lambda top, bottom: tuple(
        np.divide(top, bottom, out=np.ones_like(top), where=bottom > 0).tolist()
    )
    return Quality(
        recall=ratio(totals["right"], totals["positive"]),
        precision=ratio(totals["right"], totals["predicted"]),
        f1=ratio(2 * totals["right"], totals["predicted"] + totals["positive"]),
        selected=ratio(totals["found"], totals["positive"]),
        captured=ratio(totals["captured"], totals["reachable"]),
        epoch=(0,) * len(totals["right"]),
    )


@functools.partial(jax.jit, static_argnames="task")
def _counts(task: Task, weights: Weights, inputs: Array, records: Array, real: Array) -> dict[str, Array]:
    inputs = inputs.astype(next(iter(weights.values())).dtype)
    of_layer: Callable[..., dict[str, Array]] = lambda w, x, record: count(task, w, x, record, real)
    return jax.vmap(of_layer)(weights, inputs, records)


def _check_finite(losses: Array, options: TrainOptions) -> None:
    bad = np.flatnonzero(~np.isfinite(np.asarray(losses)))
    if len(bad):
        got = f"loss {losses[bad[0]]} at learning rate {options.learning_rate}"
        raise diverged(f"the router of layer {bad[0]}", got)


def _stack(routers: Routers) -> LayerRouter:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *routers.layers)


def _routers(stacked: LayerRouter, activations: Activations) -> Routers:
    """The trained routers, with the means that the activations hold and marked with what they were trained on."""
    if activations.means is not None:
        stacked = dataclasses.replace(stacked, mean=jnp.asarray(activations.means, activations.dtype))
    count = activations.config.num_layers
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count))
    return Routers(layers, activations.fingerprint, activations.importance)
