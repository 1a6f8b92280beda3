"""What learning needs on the device, as the compiler plans it before anything runs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.memory import device_memory, fraction_hint, memory_line, planned_memory, tree_bytes
from polarjax.model.decoder import Decoder
from polarjax.model.taps import TapSpec
from polarjax.progress import tell
from polarjax.selection.routers import init_routers
from polarjax.selection.selectors import Oracle
from polarjax.sparsity import calibration, collection, training
from polarjax.sparsity.activations import array_specs, means_shape, part_of
from polarjax.sparsity.collection import Recording, plan_recording
from polarjax.sparsity.minibatches import Cut
from polarjax.sparsity.objectives import GroupTask, NeuronTask, Task, weights_of
from polarjax.sparsity.options import CalibrateOptions, CollectOptions, TrainOptions
from polarjax.types import DTypeLike

type Memory = dict[str, int]
"""What `polarjax.memory.planned_memory` returns."""


def collecting_memory(
    model: Decoder, length: int, recording: Recording, batch_size: int, layers: range | None = None
) -> Memory:
    """Bytes that recording needs with windows of `length` tokens, `batch_size` at a time.

    `layers` are recorded; None means those of the pass that needs the most.
    """
    config = model.config
    mean = jax.ShapeDtypeStruct(means_shape(config)[1:], jnp.float32)
    means = (mean,) * config.num_layers if recording.mean_outputs else ()
    selector = Oracle(means, recording.importance)  # pyrefly: ignore[bad-argument-type]
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    if layers is None:
        layers = recording.parts[-1]
    spec = TapSpec(activity=config.neuron_sparsity)
    program = collection._taps.lower(model, selector, tokens, spec, layers).compile()
    return planned_memory(program, made=tree_bytes(means, tokens))


def training_memory(config: ModelConfig, dtype: DTypeLike, tokens: int, options: TrainOptions) -> Memory:
    """Bytes that training the routers of `config` on so many tokens needs."""
    initial = jax.eval_shape(
        lambda key: training._stack(init_routers(config, key, rank=options.rank)), jax.random.key(0)
    )
    tasks: list[Task] = [GroupTask(1, options.group_objective)]
    if config.neuron_sparsity:
        tasks.append(NeuronTask(config.d_ff))
    found = []
    for task in tasks:
        weights = weights_of(task, initial)
        state = jax.eval_shape(jax.vmap(training._optimizer(options).init), weights)
        batch = options.neuron_batch if isinstance(task, NeuronTask) else options.group_batch
        inputs, records, order = _piece(config, dtype, tokens, task, batch, options.memory_bytes)
        program = training._steps.lower(task, options, weights, state, inputs, records, order).compile()
        beside = tree_bytes(initial, weights)  # the first weights, and the best so far
        found.append(
            planned_memory(program, made=beside + tree_bytes(weights, state, inputs, records, order))
        )
    return max(found, key=lambda memory: memory["total"])


def _piece(config: ModelConfig, dtype: DTypeLike, tokens: int, task: Task, batch: int, memory_bytes: int):
    """Shapes of the router inputs [L m D], the records [L m n] and the order [steps b] of one call."""
    specs = array_specs(config, dtype, 1)
    (L, _, n), stored = specs[task.record]
    dtype = jnp.dtype(dtype)
    row = L * (config.d_model * dtype.itemsize + n * stored.itemsize)
    cut = Cut.of(tokens, batch, row, memory_bytes)
    return (
        jax.ShapeDtypeStruct((L, cut.tokens, config.d_model), dtype),
        jax.ShapeDtypeStruct((L, cut.tokens, n), stored),
        jax.ShapeDtypeStruct((cut.steps, cut.batch), jnp.int32),
    )


def calibrating_memory(
    config: ModelConfig, dtype: DTypeLike, tokens: int, options: CalibrateOptions, *, rank: int | None = None
) -> Memory | None:
    """Bytes that calibrating on so many held-out tokens needs beside the routers; None for models without ReLU."""
    if not config.neuron_sparsity:
        return None
    one = jax.eval_shape(lambda key: init_routers(config, key, rank=rank).layers[0], jax.random.key(0))
    router = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), one)
    rows = min(tokens, max(options.max_tokens, options.batch_sizes[-1]))
    inputs = jax.ShapeDtypeStruct((rows, config.d_model), jnp.dtype(dtype))
    packed = jax.ShapeDtypeStruct((rows, -(-config.d_ff // 8)), jnp.uint8)
    program = calibration._scored.lower(router, inputs, packed, config.d_ff).compile()
    return planned_memory(program, made=tree_bytes(inputs, packed))


def check_fits(what: str, memory: Memory, hint: str) -> None:
    """Raises `InputError` if a stage needs more memory than the device has."""
    limit = device_memory()
    if limit is not None and memory["total"] > limit:
        raise InputError(
            f"{what} does not fit the device's memory",
            got=f"{memory['total'] / 1e9:,.2f} GB",
            expected=f"at most {limit / 1e9:,.2f} GB",
            hint=fraction_hint(memory["total"]) or hint,
        )


def planned(
    model: Decoder,
    shape: tuple[int, ...],
    recording: Recording,
    collecting: CollectOptions,
    training: TrainOptions,
    calibration: CalibrateOptions,
) -> tuple[Recording, CollectOptions]:
    """The recording and the options with as many passes and as small batches as the device's memory takes.

    Prints what each stage will need.

    Raises:
      InputError: a stage doesn't fit with any.
    """
    limit, L = device_memory() or math.inf, model.config.num_layers
    tokens = [int(np.sum(recording.part == part)) for part in range(2)]
    while True:
        config = part_of(model.config, recording.parts[0])
        learning = training_memory(config, model.dtype, tokens[0], training)
        passes = len(recording.parts)
        if learning["total"] <= limit or passes == L or collecting.folder is not None:
            break
        parts = {"in_parts": True, "at_least": min(2 * passes, L)}
        recording = plan_recording(model, shape, collecting, **parts)
    batch, recorded = collecting_batch(model, shape, recording, collecting.batch_size)
    tell(memory_line("collecting", recorded))
    few = (
        "drop --activations, so that a few layers at a time can be trained, or use a device with more memory"
    )
    check_fits("training routers", learning, few)
    tell(memory_line("training routers", learning))
    held_out = calibrating_memory(config, model.dtype, tokens[1], calibration, rank=training.rank)
    if held_out is not None:
        check_fits("calibrating", held_out, "use a device with more memory")
        tell(memory_line("calibrating", held_out))
    return recording, dataclasses.replace(collecting, batch_size=batch)


def collecting_batch(
    model: Decoder, shape: tuple[int, ...], recording: Recording, batch_size: int
) -> tuple[int, Memory]:
    """How many windows at a time can be collected, at most `batch_size`, and what that needs.

    Raises:
      InputError: not even one.
    """
    size, limit = min(batch_size, shape[0]), device_memory() or math.inf
    while (memory := collecting_memory(model, shape[1], recording, size))["total"] > limit and size > 1:
        size //= 2
    check_fits("collecting", memory, "shorten the windows (--window), or use a device with more memory")
    return size, memory
