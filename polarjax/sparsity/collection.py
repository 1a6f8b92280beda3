"""Records a model's activations to disk, compactly and within a size limit."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from polarjax.errors import InputError
from polarjax.model import decoder
from polarjax.model.checks import check_model, check_windows
from polarjax.model.parameters import fingerprint
from polarjax.model.taps import Taps, TapSpec
from polarjax.numeric import whole_number
from polarjax.progress import task
from polarjax.sparsity.activations import (
    Activations,
    array_specs,
    is_activations,
    open_activations,
    row_bytes,
    write_meta,
)
from polarjax.sparsity.checks import check_flags, check_held_out, check_size
from polarjax.sparsity.options import HELD_OUT, MAX_BYTES, CollectOptions
from polarjax.storage.atomic import absolute, atomic_folder
from polarjax.types import Array, Int, Int32, UInt8

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly


@dataclasses.dataclass(frozen=True)
class Recording:
    """What `collect` will write.

    Attributes:
      positions: recorded tokens, as indices into the concatenated windows, ascending [n].
      part: part of each recorded token, uint8 [n]: 0 train, 1 validation, 2 test.
      offered: tokens in all windows.
      num_bytes: size on disk.
    """

    positions: Int[np.ndarray, "n"]
    part: UInt8[np.ndarray, "n"]
    offered: int
    num_bytes: int

    def __str__(self) -> str:
        tokens = f"{len(self.part):,}"
        if len(self.part) < self.offered:
            tokens = f"{tokens} of {self.offered:,}, evenly spread to fit the limit"
        return f"{self.num_bytes / 1e6:,.1f} MB of activations ({tokens} tokens)"


def plan_recording(model: "decoder.Decoder", shape: tuple[int, ...], options: CollectOptions) -> Recording:
    """Plans the recording of windows of shape [n T]: which tokens, which part each belongs to, and the size on disk.

    Raises:
      InputError: unusable options, too few windows, or more than `options.max_bytes`.
    """
    check_flags("collect", fit=options.fit)
    check_size(options.max_bytes)
    count, length = shape
    part = split_windows(count, options.held_out)
    each = row_bytes(model.config, model.dtype)
    positions = kept_positions(count * length, each, options.max_bytes, options.fit)
    return Recording(positions, part[positions // length], count * length, each * len(positions))


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
) -> Activations:
    """Runs the dense model over token windows and writes what routers learn from.

    Recorded are router inputs, group norms, how far attention turns the residual stream and, for ReLU models,
    neuron activity at one bit per neuron. The folder appears at `out_dir` only when it is complete; an
    interrupted run leaves nothing there.

    Args:
      model: the decoder.
      windows: int [n T], full windows of token ids; T at most the model's positions.
      out_dir: the folder to create.
      held_out: fractions of the windows for (validation, test); routers never learn from them.
      max_bytes: limit on the size on disk, checked before anything is written.
      fit: above the limit, record fewer positions, evenly spread, instead of raising.
      overwrite: replace activations that are already at `out_dir`.
      batch_size: windows per forward pass.

    Returns:
      The activations, memory-mapped.

    Raises:
      InputError: bad windows, too few of them, or more than `max_bytes`.
      CheckpointError: `out_dir` exists, or the disk refuses.
    """
    check_model(model, where="collect")
    batch_size = whole_number(batch_size, "batch_size", where="collect")
    check_flags("collect", overwrite=overwrite)
    windows = check_windows(windows, model.config)
    options = CollectOptions(held_out=held_out, max_bytes=max_bytes, fit=fit)
    recording = plan_recording(model, windows.shape, options)
    return record(model, windows, recording, out_dir, overwrite=overwrite, batch_size=batch_size)


def record(
    model: "decoder.Decoder",
    windows: Int32[np.ndarray, "n T"],
    recording: Recording,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    batch_size: int = 8,
) -> Activations:
    """`collect` with checked arguments; `recording` is what `plan_recording` returned for these windows.

    Raises:
      CheckpointError: `out_dir` exists, or the disk refuses.
    """
    config, dtype, out = model.config, model.dtype, absolute(out_dir)
    specs = array_specs(config, dtype, len(recording.positions))
    with atomic_folder(out, overwrite=overwrite, may_replace=is_activations) as folder:
        arrays = {name: _allocate(folder / f"{name}.npy", *spec) for name, spec in specs.items()}
        arrays["part"][:] = recording.part
        _record_all(model, windows, recording.positions, arrays, min(batch_size, len(windows)))
        for array in arrays.values():
            array.flush()
        write_meta(folder, config, dtype, tokens=len(recording.positions), fingerprint=fingerprint(model))
    return open_activations(out)


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


def kept_positions(offered: int, bytes_each: int, max_bytes: int, fit: bool) -> Int[np.ndarray, "kept"]:
    """Ascending positions of the token stream to record: all of them, or as many as fit, evenly spread.

    The stream is cut into `kept` equal stretches, and one position is taken from each. Its place in the stretch
    varies, so that the spacing does not resonate with the window length.

    Raises:
      InputError: all positions need more than `max_bytes` and `fit` is False, or not even 64 fit.
    """
    allowed = min(offered, int(max_bytes) // bytes_each)
    if allowed < offered and (not fit or allowed < 64):
        raise InputError(
            "the activations would be larger than allowed",
            where="collect",
            got=f"{offered * bytes_each / 1e9:.3g} GB for {offered:,} tokens",
            expected=f"at most {max_bytes / 1e9:.3g} GB",
            hint="raise --max-gb, use less text, or pass --fit to record fewer positions",
        )
    edges = np.arange(allowed + 1) * offered // max(allowed, 1)
    stagger = np.arange(allowed) * _GOLDEN % 1.0
    return edges[:-1] + (stagger * np.diff(edges)).astype(edges.dtype)


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A file-backed array whose blocks are reserved, so that a full disk is an error here instead of a crash later."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _record_all(
    model: "decoder.Decoder", windows: np.ndarray, kept: np.ndarray, arrays: dict[str, np.memmap], batch: int
) -> None:
    """Forward passes of `batch` windows; the last one is filled with repeats, so that only one shape is compiled."""
    count, length = windows.shape
    spec = TapSpec(activity="activity" in arrays)
    with task("collect activations", count, "windows") as advance:
        for start in range(0, count, batch):
            stop = min(start + batch, count)
            tokens = jax.device_put(windows[np.arange(start, start + batch) % count])
            taps = _taps(model, tokens, spec)
            low, high = np.searchsorted(kept, (start * length, stop * length))
            rows = kept[low:high] - start * length
            for name in arrays.keys() - {"part"}:
                for layer, record in enumerate(getattr(taps, name)):
                    flat = jax.device_get(record).reshape(batch * length, *record.shape[2:])
                    arrays[name][layer, low:high] = flat[rows].view(arrays[name].dtype)
            advance(stop - start)


@functools.partial(jax.jit, static_argnames="spec")
def _taps(model: "decoder.Decoder", tokens: Int[Array, "b T"], spec: TapSpec) -> Taps:
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    return cast(Taps, decoder.forward(model, tokens, lengths, taps=spec)[1])
