"""A model directory: config, parameters, tokenizer, routers, plans and the manifest that holds them together.

config.json     ModelConfig and the format version
params/         orbax checkpoint of the parameters, one array for each dotted path
tokenizer/      the HuggingFace files, generation_config.json among them
routers/        manifest.json and arrays/, an orbax checkpoint, once routers were trained
plans.json      the PlanTable, once it was calibrated
hf_config.json  config.json of the HuggingFace folder that it was converted from
manifest.json   format version, dtype, source, shapes and checksums of params/
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import polarjax
from polarjax.arrays import BATCH_BYTES, ArrayWriter, Record, check_record, read_arrays
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, InputError, SparsityError
from polarjax.generation_config import GenerationSettings
from polarjax.manifest import (
    AGAIN,
    FORMAT,
    SOURCE_CONFIG,
    read_config,
    read_manifest,
    read_part,
    read_source_config,
)
from polarjax.model import Decoder, parameters, shapes, with_parameters
from polarjax.sparsity.plan import PlanTable
from polarjax.sparsity.router import LayerRouter, Routers
from polarjax.sparsity.select import Sparsity
from polarjax.storage import absolute, atomic_file, atomic_folder, dump_json, write_json
from polarjax.tokenizer import Tokenizer, has_tokenizer
from polarjax.tokenizer_files import copy_tokenizer
from polarjax.types import Array, DTypeLike

_SPARSIFY = "run polarjax sparsify again"
_CALIBRATE = "run polarjax calibrate or polarjax sparsify again"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a model directory holds.

    Attributes:
      model: the decoder with its parameters.
      tokenizer: None where the source had none.
      routers: None until they are trained.
      plans: None until they are calibrated.
      model_type: the HuggingFace family that the model was converted from, if it was.
      source_config: config.json of the HuggingFace folder that it was converted from, if it was.
    """

    model: Decoder
    tokenizer: Tokenizer | None = None
    routers: Routers | None = None
    plans: PlanTable | None = None
    model_type: str | None = None
    source_config: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    @property
    def generation(self) -> GenerationSettings:
        """Stop ids, stop strings and sampling defaults that the model asks for; empty without a tokenizer."""
        return GenerationSettings() if self.tokenizer is None else self.tokenizer.generation

    def sparsity(self, batch_size: int, head_density: float | None = None) -> Sparsity:
        """What to skip when decoding `batch_size` sequences.

        Args:
          batch_size: B; neurons are taken from the plan of the next larger calibrated batch.
          head_density: fraction of groups to keep, above 0 and at most 1; None takes the calibrated default.

        Raises:
          SparsityError: there are no routers or plans yet, or the density is not one.
        """
        sparsify = "run polarjax sparsify OUT --text FILE first"
        calibrate = f"run polarjax calibrate OUT --activations FOLDER, or {sparsify}"
        parts = ((self.routers, "routers", sparsify), (self.plans, "plans", calibrate))
        for part, name, mend in parts:
            if part is None:
                raise SparsityError(f"the model has no {name} yet", where="Bundle.sparsity", mend=mend)
        plan = self.plans.for_batch(batch_size, self.model.config, head_density)  # pyright: ignore[reportOptionalMemberAccess]
        return Sparsity(self.routers, plan)  # pyright: ignore[reportArgumentType]


class ModelWriter:
    """Fills a model directory that is being made; see `new_model`."""

    def __init__(self, folder: Path, config: ModelConfig, params: ArrayWriter, *, model_type: str | None):
        self.folder = folder
        self._config = config
        self._expected = shapes(config)
        self._model_type = model_type
        self._params = params

    @property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer files and generation_config.json belong."""
        folder = self.folder / "tokenizer"
        folder.mkdir(exist_ok=True)
        return folder

    def copy_tokenizer(
        self, source: Path, config: Mapping[str, Any]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Takes over the tokenizer of a HuggingFace folder, mended; names of files and notes (`copy_tokenizer`)."""
        return copy_tokenizer(source, self.tokenizer_folder, model_type=self._model_type or "", config=config)

    def reserve(self, size: int) -> np.ndarray:
        """Memory of `size` bytes in which the next parameter can be made: `ArrayWriter.reserve`."""
        return self._params.reserve(size)

    def add(self, name: str, array: np.ndarray) -> None:
        """Writes the parameter with the dotted path `name`; every one exactly once, in any order."""
        if name in self._params.arrays or array.shape != self._expected.get(name):
            expected = self._expected.get(name, "no such parameter")
            raise CheckpointError(
                "unknown, repeated or mis-shaped parameter", where=name, got=array.shape, expected=expected
            )
        self._params.add(name, array)

    def finish(self) -> None:
        """Writes the configuration and the manifest; raises `CheckpointError` if parameters are missing."""
        missing = sorted(self._expected.keys() - self._params.arrays.keys())
        if missing:
            got = f"none of {', '.join(missing[:10])}"
            raise CheckpointError("parameters are missing", where="model directory", got=got)
        record = self._params.close()
        write_json(self.folder / "config.json", {"format": FORMAT, **self._config.to_json()})
        manifest = {
            "format": FORMAT,
            "polarjax": polarjax.__version__,
            "model_type": self._model_type,
            "dtype": record["arrays"]["embed.tokens"]["dtype"],
            "params": record,
        }
        write_json(self.folder / "manifest.json", manifest)


@contextlib.contextmanager
def new_model(
    path: str | os.PathLike[str],
    config: ModelConfig,
    *,
    model_type: str | None = None,
    overwrite: bool = False,
    largest: int = 0,
    num_bytes: int = 0,
) -> Iterator[ModelWriter]:
    """Makes a model directory that appears at `path` only when the block ends without an exception.

    Args:
      path: the directory to make.
      config: of the model; its parameters are all expected.
      model_type: the HuggingFace family it comes from.
      overwrite: whether an existing model directory is replaced.
      largest: bytes of the largest parameter, if known; that much is gathered before it is written.
      num_bytes: of all parameters, if known; the disk must have room for so many.

    Raises:
      CheckpointError: `path` exists, the disk refuses, or a parameter is missing, unknown or mis-shaped.
    """
    options = {"overwrite": overwrite, "may_replace": is_model_directory, "num_bytes": num_bytes}
    batch_bytes = max(largest, BATCH_BYTES)
    with (
        atomic_folder(absolute(path), **options) as folder,
        ArrayWriter(folder / "params", batch_bytes=batch_bytes) as params,
    ):
        writer = ModelWriter(folder, config, params, model_type=model_type)
        yield writer
        writer.finish()


def is_model_directory(path: Path) -> bool:
    """Whether `path` was written by this module."""
    return (path / "manifest.json").is_file() and (path / "params").is_dir()


def save(path: str | os.PathLike[str], bundle: Bundle, *, overwrite: bool = False) -> None:
    """Writes a model directory; parameters keep their dtypes.

    Raises:
      CheckpointError: `path` exists and `overwrite` is False, or the disk refuses.
      SparsityError: routers or plans do not fit the model.
    """
    model = bundle.model
    with new_model(path, model.config, model_type=bundle.model_type, overwrite=overwrite) as writer:
        for name, value in parameters(model).items():
            writer.reserve(value.nbytes)
            writer.add(name, np.asarray(value))
        if bundle.source_config is not None:
            write_json(writer.folder / SOURCE_CONFIG, dict(bundle.source_config))
        if bundle.tokenizer is not None:
            shutil.copytree(bundle.tokenizer.folder, writer.tokenizer_folder, dirs_exist_ok=True)
        if bundle.routers is not None:
            bundle.routers.check(model.config)
            _write_routers(writer.folder / "routers", bundle.routers)
        if bundle.plans is not None:
            bundle.plans.check(model.config)
            write_json(writer.folder / "plans.json", bundle.plans.to_json())


def load(path: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> Bundle:
    """Reads a model directory onto the default device.

    Args:
      path: the directory.
      dtype: of the parameters, a floating one; None keeps the stored one. Routers keep theirs.

    Raises:
      InputError: `dtype` is not floating.
      CheckpointError: a part is missing or damaged, or was written by a newer polarjax.
      SparsityError: routers or plans are for another model.
    """
    if dtype is not None:
        dtype = _floating(dtype)
    folder = absolute(path)
    manifest = read_manifest(folder)
    config = read_config(folder)
    flat = read_arrays(folder / "params", manifest["params"], dtype=dtype, mend=AGAIN)
    return Bundle(
        model=with_parameters(config, flat),
        tokenizer=_read_tokenizer(folder / "tokenizer", manifest["model_type"]),
        routers=_read_routers(folder / "routers", config),
        plans=_read_plans(folder / "plans.json", config),
        model_type=manifest["model_type"],
        source_config=read_source_config(folder),
    )


def _floating(dtype: DTypeLike) -> np.dtype:
    with contextlib.suppress(TypeError):
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.dtype(dtype)
    raise InputError("unusable dtype", where="dtype", got=dtype, expected="float32, float16 or bfloat16")


def write_routers(path: str | os.PathLike[str], routers: Routers) -> None:
    """Puts trained routers into the model directory `path`, replacing earlier ones in one step.

    Plans are removed: they were calibrated for the earlier routers.

    Raises:
      CheckpointError: `path` is no model directory.
      SparsityError: the routers are for another model.
    """
    folder = absolute(path)
    read_manifest(folder)
    _located(folder / "routers", routers.check, read_config(folder))
    with atomic_folder(folder / "routers", overwrite=True, obsolete=folder / "plans.json") as temporary:
        _write_routers(temporary, routers)


def write_plans(path: str | os.PathLike[str], plans: PlanTable) -> None:
    """Puts a calibrated table into the model directory `path`, replacing an earlier one in one step.

    Raises:
      CheckpointError: `path` is no model directory.
      SparsityError: the plans are for another model.
    """
    folder = absolute(path)
    read_manifest(folder)
    _located(folder / "plans.json", plans.check, read_config(folder))
    with atomic_file(folder / "plans.json", overwrite=True) as stream:
        dump_json(stream, plans.to_json())


def _read_tokenizer(folder: Path, model_type: str | None) -> Tokenizer | None:
    return Tokenizer.load(folder, model_type=model_type) if has_tokenizer(folder) else None


def _write_routers(folder: Path, routers: Routers) -> None:
    folder.mkdir(exist_ok=True)
    with ArrayWriter(folder / "arrays") as writer:
        for i, layer in enumerate(routers.layers):
            for field in dataclasses.fields(LayerRouter):
                value = getattr(layer, field.name)
                if value is not None:
                    writer.add(f"layers.{i}.{field.name}", np.asarray(value))
        write_json(folder / "manifest.json", {"format": FORMAT, "arrays": writer.close()})


def _read_routers(folder: Path, config: ModelConfig) -> Routers | None:
    if not folder.is_dir():
        return None
    file = folder / "manifest.json"
    record: Record = read_part(file, ("format", "arrays"), _SPARSIFY)["arrays"]
    check_record(record, where=file, mend=_SPARSIFY)
    flat = read_arrays(folder / "arrays", record, mend=_SPARSIFY)
    layers: dict[int, dict[str, Array]] = {}
    for name, value in flat.items():
        _, layer, field = name.split(".")
        layers.setdefault(int(layer), {})[field] = value
    routers = Routers(tuple(LayerRouter(**{**_NO_NEURONS, **layers[i]}) for i in sorted(layers)))
    _located(folder, routers.check, config)
    return routers


_NO_NEURONS: dict[str, Any] = {"w_in": None, "w_out": None}


def _read_plans(file: Path, config: ModelConfig) -> PlanTable | None:
    if not file.is_file():
        return None
    plans = PlanTable.from_json(read_part(file, (), _CALIBRATE))
    _located(file, plans.check, config)
    return plans


def _located(where: Path, check: Any, config: ModelConfig) -> None:
    """Runs `check(config)`; its error is told with the place where the part lies."""
    try:
        check(config)
    except SparsityError as error:
        raise SparsityError(
            error.what, where=where, got=error.got, expected=error.expected, mend=_SPARSIFY
        ) from error
