"""Neurons of models without ReLU: routers that predict what each adds to the output, plans by the share that is kept.

Nothing is recorded on disk: one layer at a time, the inputs of the MLP are in memory, [n D] for n tokens, and what its F
neurons do is computed from them again for each batch.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from polarjax.configs import ModelConfig
from polarjax.generation.checks import random_key
from polarjax.model import mlp
from polarjax.model.decoder import Decoder, attention_half, mlp_half, prompt_start
from polarjax.model.meshes import without_mesh
from polarjax.progress import task
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import Routers, score_neurons
from polarjax.sparsity.activations import Activations, Part
from polarjax.sparsity.calibration import choose, random_batches
from polarjax.sparsity.checks import check_gated, diverged
from polarjax.sparsity.collection import batches
from polarjax.sparsity.kept_share import importance, kept_share
from polarjax.sparsity.objectives import Weights, share_loss
from polarjax.sparsity.options import CalibrateOptions, NeuronOptions
from polarjax.types import Array, Float, Int, Int32, Key

_BATCH = 8  # windows per forward pass
_MEASURED = 2048  # tokens that each batch size is calibrated on, at least two batches
_PARTS: tuple[Part, ...] = ("train", "validation", "test")


@without_mesh()
@jax.transfer_guard("allow")  # it moves windows from the disk by design
def with_gated_neurons(
    model: Decoder,
    routers: Routers,
    plans: PlanTable,
    activations: Activations,
    key: Key[Array, ""],
    *,
    calibration: CalibrateOptions,
    options: NeuronOptions,
) -> tuple[Routers, PlanTable, tuple[tuple[float, ...], ...]]:
    """Adds neurons to the routers and plans of a model without ReLU.

    In each layer a router learns every neuron's share of the token's importance |activation(gate) · up| · ‖down row‖
    (`share_loss`). For each batch size, k is the smallest number of neurons, a multiple of `calibration.multiple`, with
    which the mean `kept_share` of random batches of validation tokens reaches `options.target_share`; neurons are
    ranked as in decoding. A layer is dense where k and the router's own bytes exceed `dense_above` of the MLP's, and at
    every larger batch size. If all layers are dense at all batch sizes, the routers have no neurons.

    Args:
      model, routers, plans: the decoder, and what was made for it; its neurons are replaced.
      activations: with the text that was recorded.
      key: random key of the initial weights, the order of tokens and the batches.
      calibration: batch sizes, `multiple` and `max_tokens`, and the shards that `plans` were made for.
      options: how to train, and the target.

    Returns:
      Routers, plans whose `recall` is the share kept of the validation text, and the share kept of the test text, by
      batch size, then layer.

    Raises:
      SparsityError: the model is a ReLU model, the activations hold no text, or training diverges.
      InputError: too few held-out tokens for the largest batch size.
    """
    config = model.config
    check_gated(config)
    windows = {part: activations.windows_of(part) for part in _PARTS}
    passes = [_Pass(model, _limited(windows[part], model, calibration, options, part)) for part in _PARTS]
    keys = jax.random.split(random_key(key), config.num_layers + 1)
    drawn = np.random.default_rng(np.asarray(jax.random.bits(keys[-1], (4,), jnp.uint32)))
    made, columns = [], []
    with task("learn neurons", config.num_layers, "layers") as advance:
        for i, layer in enumerate(model.layers):
            train, validation, test = (each.layer(i) for each in passes)
            weights = _train(layer.mlp, *train, keys[i], config=config, options=options)
            served = {name: value.astype(model.dtype) for name, value in weights.items()}
            made.append(served)
            measured = (layer.mlp, served, validation, test)
            columns.append(
                _plan_layer(*measured, drawn, config=config, calibration=calibration, options=options)
            )
            advance()
    rows = [tuple(zip(*row, strict=True)) for row in zip(*columns, strict=True)]
    neurons, shares, tested = (tuple(row[i] for row in rows) for i in range(3))
    if all(count is None for row in neurons for count in row):
        made = [{"w_in": None, "w_out": None}] * config.num_layers
    layers = tuple(dataclasses.replace(old, **new) for old, new in zip(routers.layers, made, strict=True))
    routers = dataclasses.replace(routers, layers=layers)
    plans = dataclasses.replace(plans, neurons=neurons, recall=shares, routers=routers.fingerprint)
    return routers, plans, tested


def gated_rank(config: ModelConfig) -> int:
    """R of these routers: D / 4, at most 1024, so that a router reads about a tenth of its MLP's bytes."""
    return max(1, min(1024, config.d_model // 4))


def router_share(config: ModelConfig, rank: int) -> float:
    """Parameters of a neuron router, as a fraction of those of the MLP's matrices."""
    D, F = config.d_model, config.d_ff
    return rank * (D + F) / ((3 if config.gated_mlp else 2) * D * F)


def _limited(
    windows: Int32[np.ndarray, "m T"],
    model: Decoder,
    calibration: CalibrateOptions,
    options: NeuronOptions,
    part: Part,
) -> Int32[np.ndarray, "m T"]:
    """As many windows as fit `memory_bytes`; of held-out text at most `max_tokens`, or one of the largest batches."""
    length = windows.shape[1]
    most = options.memory_bytes // (3 * model.config.d_model * model.dtype.itemsize * length)
    if part != "train":
        most = min(most, max(calibration.max_tokens, calibration.batch_sizes[-1]) // length + 1)
    return windows[: max(1, most)]


class _Pass:
    """The dense model's hidden states over windows, one layer after the other."""

    def __init__(self, model: Decoder, windows: Int32[np.ndarray, "m T"]):
        self._model, self._tokens, self._x = model, len(windows) * windows.shape[1], []
        self._lengths = jnp.full((min(_BATCH, len(windows)),), windows.shape[1], jnp.int32)
        self._rotation: Any = None
        for tokens, _ in batches(windows, len(self._lengths)):
            x, self._rotation = prompt_start(model, tokens, self._lengths)
            self._x.append(x)

    def layer(self, i: int) -> tuple[Float[Array, "n D"], Float[Array, "n D"]]:
        """Runs layer `i`; the inputs of its routers and of its MLP at all tokens."""
        config, found = self._model.config, []
        for number, x in enumerate(self._x):
            after = _layer(self._model.layers[i], x, self._lengths, self._rotation, config, config.window(i))
            self._x[number], *inputs = after
            found.append(inputs)
        h, y = (jnp.concatenate(each).reshape(-1, config.d_model) for each in zip(*found, strict=True))
        return h[: self._tokens], y[: self._tokens]


@functools.partial(jax.jit, static_argnames=("config", "window"))
def _layer(layer: Any, x: Array, lengths: Array, rotation: Any, config: ModelConfig, window: int | None):
    after, (h, *_) = attention_half(layer, 0, x, lengths, rotation, config, None, window)
    after, (y, *_) = mlp_half(layer, 0, after, h, config, None)
    return after, h, y


def _train(
    layer: mlp.Mlp, h: Array, y: Array, key: Key[Array, ""], *, config: ModelConfig, options: NeuronOptions
) -> Weights:
    """A trained router, float32."""
    rank = options.rank or gated_rank(config)
    keys = jax.random.split(key)
    batch = min(options.batch, len(h))
    steps = len(h) // batch * options.epochs
    order = jnp.concatenate(
        [
            jax.random.permutation(each, len(h))[: len(h) // batch * batch]
            for each in jax.random.split(keys[0], options.epochs)
        ]
    ).reshape(steps, batch)
    w_in = jax.random.normal(keys[1], (config.d_model, rank), jnp.float32) * config.d_model**-0.5
    weights = {"w_in": w_in, "w_out": jnp.zeros((rank, config.d_ff), jnp.float32)}
    rates = options.learning_rate * (0.02 + 0.98 * (1 + jnp.cos(jnp.pi * jnp.arange(steps) / steps)) / 2)
    weights, losses = _steps(layer, weights, h, y, order, rates, config)
    if not np.isfinite(np.asarray(losses)).all():
        raise diverged("neuron routers", f"learning rate {options.learning_rate}")
    return weights


@functools.partial(jax.jit, static_argnames="config")
def _steps(
    layer: mlp.Mlp,
    weights: Weights,
    h: Float[Array, "n D"],
    y: Float[Array, "n D"],
    order: Int[Array, "steps b"],
    rates: Float[Array, "steps"],
    config: ModelConfig,
) -> tuple[Weights, Float[Array, "steps"]]:
    """One step of Adam for each row of `order`; also the losses."""
    adam = optax.scale_by_adam()

    def loss(weights: Weights, rows: Array) -> Array:
        values = importance(layer, mlp.neurons(layer, y[rows], config)[1])
        return share_loss(score_neurons(h[rows].astype(jnp.float32), **weights), values)

    def step(carry: Any, batch: tuple[Array, Array]) -> tuple[Any, Array]:
        weights, state = carry
        value, slope = jax.value_and_grad(loss)(weights, batch[0])
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            change, state = adam.update(slope, state)
        return (jax.tree.map(lambda old, by: old - batch[1] * by, weights, change), state), value

    (weights, _), losses = jax.lax.scan(step, (weights, adam.init(weights)), (order, rates))
    return weights, losses


def _plan_layer(
    layer: mlp.Mlp,
    weights: Weights,
    validation: tuple[Array, Array],
    test: tuple[Array, Array],
    drawn: np.random.Generator,
    *,
    config: ModelConfig,
    calibration: CalibrateOptions,
    options: NeuronOptions,
) -> list[tuple[int | None, float, float]]:
    """(k, share kept of validation text, of test text) at each batch size; stops at the first that is dense."""
    F, smallest = config.d_ff, 1
    step = math.lcm(calibration.multiple, calibration.shards)
    counts = np.unique([*range(step, F, step), F]).astype(np.int32)
    spare = F - int(np.ceil(router_share(config, weights["w_in"].shape[1]) * F))
    shares = functools.partial(_shares, layer, weights, config=config, shards=calibration.shards)
    column: list[tuple[int | None, float, float]] = []
    for size, index, other in _drawn(drawn, calibration, len(validation[0]), len(test[0])):
        measured = jax.device_get(shares(*validation, index, jax.device_put(counts)))
        curve = np.interp(np.arange(1, F + 1), [0, *counts], [0.0, *measured])
        k = choose(
            curve, smallest, size, dataclasses.replace(calibration, target_recall=options.target_share)
        )
        if k is None or k > spare:
            break
        (tested,) = jax.device_get(shares(*test, other, jax.device_put(np.array([k], np.int32))))
        column.append((k, float(curve[k - 1]), float(tested)))
        smallest = k
    return column + [(None, 1.0, 1.0)] * (len(calibration.batch_sizes) - len(column))


def _drawn(
    drawn: np.random.Generator, calibration: CalibrateOptions, *tokens: int
) -> Iterator[Sequence[Any]]:
    """Each batch size, and random batches of it for each part with so many tokens."""
    for size in calibration.batch_sizes:
        count = min(calibration.num_batches, max(2, _MEASURED // size))
        yield size, *(jax.device_put(random_batches(drawn, each, size, count)) for each in tokens)


@functools.partial(jax.jit, static_argnames=("config", "shards"))
def _shares(
    layer: mlp.Mlp,
    weights: Weights,
    h: Float[Array, "n D"],
    y: Float[Array, "n D"],
    index: Int[Array, "g B"],
    counts: Int[Array, "c"],
    *,
    config: ModelConfig,
    shards: int,
) -> Float[Array, "c"]:
    """The mean share that batches keep with k neurons, ranked by the sum of the router's positive scores."""

    def one(rows: Array) -> Array:
        scores = jnp.sum(jax.nn.softplus(score_neurons(h[rows], **weights)), 0)
        return kept_share(layer, mlp.neurons(layer, y[rows], config)[1], scores, counts, shards)

    return jnp.mean(jax.lax.map(one, index, batch_size=max(1, 64 // index.shape[1])), 0)
