"""Writes a model directory one parameter at a time; it appears complete or not at all."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polarjax.checkpoint.manifest import FORMAT
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError
from polarjax.model.shapes import shapes
from polarjax.storage.atomic import absolute, atomic_folder, write_json
from polarjax.storage.fingerprint import combine, sample

if TYPE_CHECKING:
    from polarjax.storage.arrays import ArrayWriter


class ModelWriter:
    """Fills a model directory that is being made; see `new_model`."""

    def __init__(self, folder: Path, config: ModelConfig, params: "ArrayWriter", *, model_type: str | None):
        self.folder = folder
        self._config = config
        self._expected = shapes(config)
        self._model_type = model_type
        self._params = params
        self._samples: dict[str, np.ndarray] = {}

    @property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer files and generation_config.json belong."""
        folder = self.folder / "tokenizer"
        folder.mkdir(exist_ok=True)
        return folder

    def copy_tokenizer(
        self, source: Path, config: Mapping[str, Any]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Copies and fixes a HuggingFace folder's tokenizer; returns file names and notes (see `copy_tokenizer`)."""
        from polarjax.text.tokenizer_files import copy_tokenizer

        return copy_tokenizer(source, self.tokenizer_folder, model_type=self._model_type or "", config=config)

    def reserve(self, size: int) -> np.ndarray:
        """Memory of `size` bytes for the next parameter; see `ArrayWriter.reserve`."""
        return self._params.reserve(size)

    def add(self, name: str, array: np.ndarray) -> None:
        """Writes the parameter with dotted path `name`; add each exactly once, in any order."""
        if name in self._params.arrays or array.shape != self._expected.get(name):
            expected = self._expected.get(name, "no such parameter")
            raise CheckpointError(
                "unknown, repeated or mis-shaped parameter",
                where=name,
                got=array.shape,
                expected=expected,
                hint="add each parameter of the configuration once, in its shape",
            )
        self._params.add(name, array)
        self._samples[name] = sample(array)

    def finish(self) -> None:
        """Writes the configuration and the manifest; raises `CheckpointError` if parameters are missing."""
        missing = sorted(self._expected.keys() - self._params.arrays.keys())
        if missing:
            got = f"{', '.join(missing[:10])}"
            hint = "add every parameter of the configuration"
            raise CheckpointError("parameters are missing", where="model directory", got=got, hint=hint)
        record = self._params.close()
        write_json(self.folder / "config.json", {"format": FORMAT, **self._config.to_json()})
        manifest = {
            "format": FORMAT,
            "polarjax": version("polarjax"),
            "model_type": self._model_type,
            "dtype": record["arrays"]["embed.tokens"]["dtype"],
            "fingerprint": combine(self._samples),
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
    """Makes a model directory that appears at `path` only if the block ends without an exception.

    Args:
      path: the directory to make.
      config: the model's configuration; all its parameters must be added.
      model_type: the HuggingFace family it comes from.
      overwrite: whether an existing model directory is replaced.
      largest: bytes of the largest parameter, if known; sets the minimum batch size.
      num_bytes: bytes of all parameters, if known; that much disk space must be free.

    Raises:
      CheckpointError: `path` exists, writing fails, or a parameter is missing, unknown or mis-shaped.
    """
    from polarjax.storage.arrays import BATCH_BYTES, ArrayWriter  # imports orbax

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
