"""Recorded activations, which routers learn from; memory-mapped from disk."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError, SparsityError
from polarjax.selection.importance import IMPORTANCES, Importance
from polarjax.storage.fingerprint import same_weights, short
from polarjax.types import DTypeLike

FORMAT = 4
_READABLE = (2, 3, FORMAT)
"""Format 3 has no windows; format 2 no means either, and its importance is always "norms"."""
Part = Literal["train", "validation", "test"]
Target = Literal["activity", "norms"]
COLLECT = "collect them again: polarjax collect"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
    """A model's activations at n tokens; arrays opened from a folder are memory-mapped.

    Attributes:
      config: the recorded model's configuration.
      fingerprint: fingerprint of its weights (`polarjax.storage.fingerprint`), "" if unknown.
      dtype: dtype of the router inputs, the same as the model's.
      inputs: router inputs [L n D]; bfloat16 is stored as its uint16 bits.
      activity: packed neuron activity, uint8 [L n ceil(F / 8)], as in `Taps`; None if not recorded.
      norms: the groups' importance, float32 [L n K]; None if not recorded.
      change: how far attention turns the residual stream, float32 [L n], as in `Taps`; None if not recorded.
      part: which part each token belongs to, uint8 [n]: 0 train, 1 validation, 2 test.
      importance: what `norms` are.
      means: each group's mean part of the attention output, float32 [L K D], which replaces it where it is skipped;
        None for zeros.
      windows: the text that was offered, int32 [m T] token ids; None if not recorded.
      window_part: which part each window belongs to, uint8 [m], as in `part`; None if not recorded.
    """

    config: ModelConfig
    fingerprint: str = ""
    dtype: DTypeLike
    inputs: np.ndarray
    activity: np.ndarray | None
    norms: np.ndarray | None
    change: np.ndarray | None = None
    part: np.ndarray
    importance: Importance = "norms"
    means: np.ndarray | None = None
    windows: np.ndarray | None = None
    window_part: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """n, all parts together."""
        return len(self.part)

    def rows(self, part: Part | None = None) -> np.ndarray:
        """The row numbers of the tokens in `part` (all tokens for None), ascending."""
        return np.arange(self.num_tokens) if part is None else np.flatnonzero(self.part == _number(part))

    def windows_of(self, part: Part, *, at_least: int = 0) -> np.ndarray:
        """The windows of text in `part`, int32 [m T]; `SparsityError` if fewer than `at_least` were recorded."""
        if self.windows is None or self.window_part is None:
            hint = f"{COLLECT}; or leave out what needs the text (--refine-tokens 0, --budgets uniform)"
            raise SparsityError("these activations hold no text", where="activations", hint=hint)
        found = np.asarray(self.windows)[self.window_part == _number(part)]
        if len(found) < at_least:
            hint = f"collect with {part} text held out (held_out, --{part})"
            raise SparsityError(f"the activations hold no {part} text", where="activations", hint=hint)
        return found

    def router_inputs(self, rows: np.ndarray, layer: slice = slice(None)) -> np.ndarray:
        """The router inputs at `rows`, [L b D] in the model's dtype."""
        raw = np.stack([of_layer[rows] for of_layer in self.inputs[layer]])
        return raw.view(jnp.dtype(self.dtype))

    def records(self, kind: Target, rows: np.ndarray, layer: slice = slice(None)) -> np.ndarray:
        """The packed activity [L b bytes] or the importance [L b K] at `rows`; `SparsityError` if not recorded."""
        stored = self.activity if kind == "activity" else self.norms
        if stored is None:
            raise SparsityError(f"these activations hold no {kind}", where="activations", hint=COLLECT)
        return np.stack([of_layer[rows] for of_layer in stored[layer]])

    def attention_importance(self) -> np.ndarray:
        """The mean `change` of each layer over the training tokens, [L]; `SparsityError` if it was not recorded."""
        if self.change is None:
            raise SparsityError("these activations hold no change", where="activations", hint=COLLECT)
        return self.change[:, self.rows("train")].mean(1, dtype=np.float64)

    def check(self, config: ModelConfig, fingerprint: str | None = None) -> None:
        """Raises `SparsityError` unless they were recorded from a model with this config (and these weights)."""
        if config != self.config:
            mine, other = self.config.to_json(), config.to_json()
            name = next(name for name in mine if mine[name] != other[name])
            _refuse_model(f"{name} {mine[name]}", f"{other[name]}")
        if fingerprint is not None and not same_weights(self.fingerprint, fingerprint):
            _refuse_model(f"weights {short(self.fingerprint)}", short(fingerprint))


def _number(part: Part) -> int:
    if part not in get_args(Part):
        names = get_args(Part)
        hint = f"pass for example {names[0]!r}"
        raise InputError("no such part", got=repr(part), expected=" | ".join(names), hint=hint)
    return get_args(Part).index(part)


def _refuse_model(got: str, expected: str) -> None:
    raise SparsityError(
        "the activations are of another model", where="activations", got=got, expected=expected, hint=COLLECT
    )


def array_specs(
    config: ModelConfig, dtype: DTypeLike, tokens: int
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, stored dtype) of every array of a recording; neuron activity for ReLU models only."""
    L, D, F, K = config.num_layers, config.d_model, config.d_ff, config.num_kv_heads
    dtype = jnp.dtype(dtype)
    specs = {
        "inputs": ((L, tokens, D), np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype),
        "activity": ((L, tokens, -(-F // 8)), np.dtype(np.uint8)),
        "norms": ((L, tokens, K), np.dtype(np.float32)),
        "change": ((L, tokens), np.dtype(np.float32)),
        "part": ((tokens,), np.dtype(np.uint8)),
    }
    return {name: spec for name, spec in specs.items() if config.neuron_sparsity or name != "activity"}


def part_of(config: ModelConfig, layers: range) -> ModelConfig:
    """The configuration of a model that has only these layers, by which some of the layers are recorded."""
    window = config.sliding_window
    window = window[layers.start : layers.stop] if isinstance(window, tuple) else window
    return dataclasses.replace(config, num_layers=len(layers), sliding_window=window)


def row_bytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """Bytes on disk of one token of a recording."""
    return sum(math.prod(shape) * stored.itemsize for shape, stored in array_specs(config, dtype, 1).values())


def means_shape(config: ModelConfig) -> tuple[int, int, int]:
    """L, K, D: the shape of the mean outputs, which are stored in float32."""
    return config.num_layers, config.num_kv_heads, config.d_model


def text_specs(count: int, length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, stored dtype) of the arrays that hold `count` windows of `length` tokens."""
    return {
        "windows": ((count, length), np.dtype(np.int32)),
        "window_part": ((count,), np.dtype(np.uint8)),
    }


def is_activations(path: Path) -> bool:
    """Whether `path` is a folder of activations."""
    return (path / "meta.json").is_file() and (path / "inputs.npy").is_file()


def write_meta(
    folder: Path,
    config: ModelConfig,
    dtype: DTypeLike,
    *,
    tokens: int,
    windows: tuple[int, int],
    fingerprint: str,
    importance: Importance,
    means: bool,
) -> None:
    """Writes meta.json, which `open_activations` reads along with the arrays."""
    meta = {
        "format": FORMAT,
        "config": config.to_json(),
        "fingerprint": fingerprint,
        "dtype": jnp.dtype(dtype).name,
        "tokens": tokens,
        "windows": list(windows),
        "importance": importance,
        "means": means,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def open_activations(path: str | os.PathLike[str]) -> Activations:
    """Opens a folder that `collect` wrote, without reading the arrays into memory.

    Raises:
      InputError: the folder is missing, damaged, or of another format version.
    """
    folder = Path(path)
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta["format"] not in _READABLE:
            raise _unreadable(folder, f"format {meta['format']}", f"format {FORMAT}")
        config, fingerprint = ModelConfig.from_json(meta["config"]), str(meta["fingerprint"])
        dtype = jnp.dtype(meta["dtype"])
        importance = meta.get("importance", "norms")
        if importance not in IMPORTANCES:
            raise _unreadable(folder, f"importance {importance!r}", " | ".join(IMPORTANCES))
        specs = array_specs(config, dtype, meta["tokens"])
        if meta.get("means", False):
            specs["means"] = (means_shape(config), np.dtype(np.float32))
        if meta["format"] == FORMAT:
            specs |= text_specs(*meta["windows"])
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in specs}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, f"{type(error).__name__}: {error}") from error
    for name, (shape, stored) in specs.items():
        if (arrays[name].shape, arrays[name].dtype) != (shape, stored):
            got, expected = f"{arrays[name].dtype} {arrays[name].shape}", f"{stored} {shape}"
            raise _unreadable(folder, f"{name}: {got}", expected)
    return Activations(
        config=config,
        fingerprint=fingerprint,
        dtype=dtype,
        inputs=arrays["inputs"],
        activity=arrays.get("activity"),
        norms=arrays["norms"],
        change=arrays["change"],
        part=np.array(arrays["part"]),
        importance=importance,
        means=np.array(arrays["means"]) if "means" in arrays else None,
        windows=arrays.get("windows"),
        window_part=arrays.get("window_part"),
    )


def _unreadable(folder: Path, got: str, expected: str | None = None) -> InputError:
    return InputError(
        "not a usable folder of activations", where=folder, got=got, expected=expected, hint=COLLECT
    )
