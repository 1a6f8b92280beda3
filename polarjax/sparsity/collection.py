"""Records a model's activations to disk, compactly and within a size limit."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model import decoder
from polarjax.model.checks import check_model, check_windows
from polarjax.model.meshes import without_mesh
from polarjax.model.parameters import fingerprint
from polarjax.model.spread_checks import check_around
from polarjax.model.taps import Taps, TapSpec
from polarjax.numeric import check_flags, spread, whole_number
from polarjax.progress import task
from polarjax.selection.importance import Importance
from polarjax.selection.plans import dense_plan
from polarjax.selection.selectors import Oracle, Sparsity
from polarjax.sparsity.activations import (
    Activations,
    array_specs,
    is_activations,
    means_shape,
    open_activations,
    part_of,
    row_bytes,
    text_specs,
    write_meta,
)
from polarjax.sparsity.checks import check_held_out, check_size
from polarjax.sparsity.options import HELD_OUT, MAX_BYTES, CollectOptions
from polarjax.sparsity.positions import divided, kept_positions
from polarjax.storage.atomic import absolute, atomic_folder
from polarjax.types import Array, Float, Int, Int32, UInt8

MEAN_WINDOWS = 64
"""Most training windows that mean outputs are measured on."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """What `collect` will write.

    Attributes:
      positions: recorded tokens, as indices into the concatenated windows, ascending [n].
      part: part of each recorded token, uint8 [n]: 0 train, 1 validation, 2 test.
      window_part: part of each window, uint8 [m].
      offered: tokens in all windows.
      num_bytes: size on disk; if not all layers are recorded at a time, that of the most that are.
      importance: what is recorded of each group.
      mean_outputs: whether each group's mean output is measured first.
      parts: the layers that are recorded at a time.
    """

    positions: Int[np.ndarray, "n"]
    part: UInt8[np.ndarray, "n"]
    window_part: UInt8[np.ndarray, "m"]
    offered: int
    num_bytes: int
    importance: Importance
    mean_outputs: bool
    parts: tuple[range, ...]

    def __str__(self) -> str:
        tokens = f"{len(self.part):,}"
        if len(self.part) < self.offered:
            tokens = f"{tokens} of {self.offered:,}, evenly spread to fit the limit"
        size = f"{self.num_bytes / 1e6:,.1f} MB of activations ({tokens} tokens)"
        if len(self.parts) > 1:
            most = max(map(len, self.parts))
            size += f" at a time: up to {most} of {self.parts[-1].stop} layers, in {len(self.parts)} passes"
        return size


def plan_recording(
    model: "decoder.Decoder",
    shape: tuple[int, ...],
    options: CollectOptions,
    *,
    in_parts: bool = False,
    at_least: int = 1,
) -> Recording:
    """Plans the recording of windows of shape [n T]: which tokens, which part each belongs to, and the size on disk.

    With `in_parts`, fewer layers are recorded at a time if all would exceed `options.max_bytes`, unless `options.fit`;
    in `at_least` so many passes.

    Raises:
      InputError: unusable options, too few windows, or more than `options.max_bytes`.
    """
    check_flags("collect", fit=options.fit, mean_outputs=options.mean_outputs)
    check_size(options.max_bytes)
    count, length = shape
    part = split_windows(count, options.held_out)
    config, L = model.config, model.config.num_layers
    fixed_of = lambda layers: _fixed_bytes(part_of(config, layers), shape, options.mean_outputs)
    each_of = lambda layers: row_bytes(part_of(config, layers), model.dtype)
    passes = at_least
    if in_parts and not options.fit:
        size = lambda layers: count * length * each_of(layers) + fixed_of(layers)
        passes = next((n for n in range(passes, L) if size(divided(L, n)[0]) <= options.max_bytes), L)
    parts = divided(L, passes)
    each, fixed = each_of(parts[0]), fixed_of(parts[0])
    alone = {"fixed": fixed, "one_layer": passes > 1}
    positions = kept_positions(count * length, each, options.max_bytes, options.fit, **alone)
    return Recording(
        positions,
        part[positions // length],
        part,
        count * length,
        each * len(positions) + fixed,
        options.importance,
        options.mean_outputs,
        parts,
    )


def _fixed_bytes(config: ModelConfig, shape: tuple[int, ...], mean_outputs: bool) -> int:
    """Bytes on disk of the text and the mean outputs."""
    text = sum(math.prod(shape) * stored.itemsize for shape, stored in text_specs(*shape).values())
    return text + (4 * math.prod(means_shape(config)) if mean_outputs else 0)


def collect(
    model: "decoder.Decoder",
    windows: Int[np.ndarray, "n T"],
    out_dir: str | os.PathLike[str],
    *,
    held_out: tuple[float, float] = HELD_OUT,
    max_bytes: int = MAX_BYTES,
    fit: bool = False,
    overwrite: bool = False,
    batch_size: int = 8,
    importance: Importance = "contributions",
    mean_outputs: bool = True,
) -> Activations:
    """Runs the dense model over token windows and writes what routers learn from.

    Recorded are the windows, router inputs, the importance of each group, how far attention turns the residual
    stream and, for ReLU models, neuron activity at one bit per neuron. A first pass over at most `MEAN_WINDOWS`
    training windows measures the mean output of each group. The folder appears at `out_dir` only when it is complete;
    an interrupted run leaves nothing there.

    Args:
      model: the decoder.
      windows: int [n T], full windows of token ids; T at most the model's positions.
      out_dir: the folder to create.
      held_out: fractions of the windows for (validation, test); routers never learn from them.
      max_bytes: limit on the size on disk, checked before anything is written.
      fit: above the limit, record fewer positions, evenly spread, instead of raising.
      overwrite: replace activations that are already at `out_dir`.
      batch_size: windows per forward pass.
      importance: what makes a group important, see `polarjax.selection.importance.Importance`; published: "norms".
      mean_outputs: whether a skipped group is replaced by its mean output; published: False, by zeros.

    Returns:
      The activations, memory-mapped.

    Raises:
      InputError: bad windows, too few of them, or more than `max_bytes`.
      CheckpointError: `out_dir` exists, or the disk refuses.
    """
    check_model(model, where="collect")
    check_around(model)
    batch_size = whole_number(batch_size, "batch_size", where="collect")
    check_flags("collect", overwrite=overwrite)
    windows = check_windows(windows, model.config)
    options = CollectOptions(
        held_out=held_out, max_bytes=max_bytes, fit=fit, importance=importance, mean_outputs=mean_outputs
    )
    recording = plan_recording(model, windows.shape, options)
    return record(model, windows, recording, out_dir, overwrite=overwrite, batch_size=batch_size)


@without_mesh()
def record(
    model: "decoder.Decoder",
    windows: Int32[np.ndarray, "n T"],
    recording: Recording,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    batch_size: int = 8,
    layers: range | None = None,
    means: Float[np.ndarray, "L K D"] | None = None,
) -> Activations:
    """`collect` with checked arguments; `recording` is what `plan_recording` returned for these windows.

    `layers` are recorded, all for None, as if there were no others. `means` are those of all layers; None measures
    them.

    Raises:
      CheckpointError: `out_dir` exists, or the disk refuses.
    """
    layers = range(model.config.num_layers) if layers is None else layers
    config, dtype, out = part_of(model.config, layers), model.dtype, absolute(out_dir)
    specs = array_specs(config, dtype, len(recording.positions))
    with atomic_folder(
        out, overwrite=overwrite, may_replace=is_activations, num_bytes=recording.num_bytes
    ) as folder:
        arrays = {name: _allocate(folder / f"{name}.npy", *spec) for name, spec in specs.items()}
        arrays["part"][:] = recording.part
        np.save(folder / "windows.npy", windows)
        np.save(folder / "window_part.npy", recording.window_part)
        if recording.mean_outputs:
            if means is None:
                means = means_of(model, windows, recording, batch_size)
            np.save(folder / "means.npy", means[layers.start : layers.stop])
        selector = Oracle(() if means is None else tuple(map(jax.device_put, means)), recording.importance)
        _record_all(model, selector, windows, recording.positions, arrays, batch_size, layers)
        for array in arrays.values():
            array.flush()
        write_meta(
            folder,
            config,
            dtype,
            tokens=len(recording.positions),
            windows=(len(windows), windows.shape[1]),
            fingerprint=fingerprint(model),
            importance=recording.importance,
            means=recording.mean_outputs,
        )
    return open_activations(out)


def means_of(
    model: "decoder.Decoder", windows: Int32[np.ndarray, "n T"], recording: Recording, batch_size: int
) -> Float[np.ndarray, "L K D"]:
    """The mean outputs that go with a recording."""
    chosen = windows_for_means(windows[recording.window_part == 0])
    return measure_means(model, chosen, min(batch_size, len(windows)))


def split_windows(count: int, held_out: tuple[float, float], seed: int = 0) -> UInt8[np.ndarray, "count"]:
    """Assigns each window to a part at random: 0 train, 1 validation, 2 test.

    A fraction above 0 gets at least one window.

    Raises:
      InputError: the fractions are unusable, or nothing is left to train on.
    """
    check_held_out(held_out)
    sizes = [max(1, round(fraction * count)) if fraction > 0 else 0 for fraction in held_out]
    if sum(sizes) >= count:
        raise InputError(
            "the text is too short to train on",
            got=f"{count} windows",
            expected=f"at least {sum(fraction > 0 for fraction in held_out) + 1}",
            hint="use a longer text or a smaller window",
        )
    part = np.repeat(np.array([1, 2, 0], np.uint8), [*sizes, count - sum(sizes)])
    return np.random.default_rng(seed).permutation(part)


def windows_for_means(windows: Int32[np.ndarray, "n T"]) -> Int32[np.ndarray, "m T"]:
    """At most `MEAN_WINDOWS` of the windows, evenly spread."""
    return windows[spread(len(windows), MEAN_WINDOWS)]


def measure_means(
    model: "decoder.Decoder", windows: Int32[np.ndarray, "m T"], batch: int
) -> Float[np.ndarray, "L K D"]:
    """The mean over all tokens of each group's part of the attention output, without the output's bias; float32."""
    spec = TapSpec(inputs=False, activity=False, norms=False, change=False, heads=True)
    totals: list[Any] = [0.0] * model.config.num_layers
    with task("measure mean outputs", len(windows), "windows") as advance:
        for tokens, count in batches(windows, batch):
            for layer, heads in enumerate(_taps(model, Oracle(), tokens, spec).heads):
                totals[layer] = totals[layer] + np.asarray(jax.device_get(heads), np.float64)[:count].sum(0)
            advance(count)
    projected = [
        np.einsum("kgh,kghd->kd", total / len(windows), np.asarray(jax.device_get(layer.attn.wo[...]), float))
        for total, layer in zip(totals, model.layers, strict=True)
    ]
    return np.stack(projected).astype(np.float32)


def batches(windows: Int32[np.ndarray, "n T"], batch: int) -> Iterator[tuple[Array, int]]:
    """Yields `batch` windows at a time, and how many count; the last is filled with repeats, for one compiled shape."""
    for start in range(0, len(windows), batch):
        index = np.arange(start, start + batch) % len(windows)
        yield jax.device_put(windows[index]), min(batch, len(windows) - start)


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A file-backed array whose blocks are reserved, so that a full disk is an error here instead of a crash later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _record_all(
    model: "decoder.Decoder",
    selector: Oracle,
    windows: np.ndarray,
    kept: np.ndarray,
    arrays: dict[str, np.memmap],
    batch_size: int,
    layers: range,
) -> None:
    """Fills the arrays by forward passes; `selector` says what is recorded of groups."""
    length, spec = windows.shape[1], TapSpec(activity="activity" in arrays)
    batch = min(batch_size, len(windows))
    some = "" if len(layers) == model.config.num_layers else f", layers {layers.start} to {layers.stop - 1}"
    with task(f"collect activations{some}", len(windows), "windows") as advance:
        for number, (tokens, count) in enumerate(batches(windows, batch)):
            taps = _taps(model, selector, tokens, spec, layers)
            start = number * batch
            low, high = np.searchsorted(kept, (start * length, (start + count) * length))
            rows = kept[low:high] - start * length
            for name in arrays.keys() - {"part"}:
                for layer, record in enumerate(getattr(taps, name)):
                    flat = jax.device_get(record).reshape(batch * length, *record.shape[2:])
                    arrays[name][layer, low:high] = flat[rows].view(arrays[name].dtype)
            taps = None  # so that the next batch's records aren't on the device beside these
            advance(count)


@functools.partial(jax.jit, static_argnames=("spec", "layers"))
def _taps(
    model: "decoder.Decoder",
    selector: Oracle,
    tokens: Int[Array, "b T"],
    spec: TapSpec,
    layers: range | None = None,
) -> Taps:
    """The records of the dense model's `layers`, all for None; `selector` says what makes a group important."""
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    dense = Sparsity(selector, dense_plan(model.config))
    taps = cast(Taps, decoder.forward(model, tokens, lengths, sparsity=dense, taps=spec)[1])
    if layers is None:
        return taps
    some = {name: value[layers.start : layers.stop] for name, value in vars(taps).items()}
    return dataclasses.replace(taps, **some)
