"""Reads a model directory one parameter at a time, without putting the model on a device."""

import functools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polarjax.checkpoint.manifest import (
    AGAIN,
    check_parameters,
    read_config,
    read_manifest,
    read_source_config,
)
from polarjax.configs import ModelConfig
from polarjax.storage.atomic import absolute, reading

if TYPE_CHECKING:
    from polarjax.storage.array_reader import StoredArrays


class ModelReader:
    """The parts of a model directory.

    Args:
      path: the directory.

    Raises:
      CheckpointError: a part is missing or damaged, or was written by a newer polarjax.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.folder = absolute(path)
        with reading(self.folder):
            self._manifest = read_manifest(self.folder)
            self.config: ModelConfig = read_config(self.folder)
        check_parameters(self._manifest, self.config, self.folder)

    @property
    def _record(self) -> dict[str, Any]:
        return self._manifest["params"]

    @property
    def model_type(self) -> str | None:
        """The HuggingFace family that the model was converted from, if any."""
        return self._manifest["model_type"]

    @property
    def dtype(self) -> np.dtype:
        """The embedding table's dtype: that of all parameters, unless they are mixed."""
        return np.dtype(self._manifest["dtype"])

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files are, if the model has one."""
        return self.folder / "tokenizer"

    @property
    def source_config(self) -> dict[str, Any] | None:
        """config.json of the HuggingFace source, if any."""
        return read_source_config(self.folder)

    def dtype_of(self, name: str) -> np.dtype:
        """Dtype of one parameter."""
        return np.dtype(self._record["arrays"][name]["dtype"])

    def num_bytes(self) -> int:
        """Size of all parameters as stored."""
        arrays = self._record["arrays"]
        return sum(math.prod(entry["shape"]) * self.dtype_of(name).itemsize for name, entry in arrays.items())

    def verify(self) -> None:
        """Raises `CheckpointError` if a parameter file is missing or cut, or has changed, except what `read` checks."""
        _ = self._stored

    def read(self, name: str) -> np.ndarray:
        """One parameter, by its dotted path; raises `CheckpointError` if its file has changed."""
        return self._stored.read(name)

    @functools.cached_property
    def _stored(self) -> "StoredArrays":
        from polarjax.storage.array_reader import StoredArrays  # imports jax

        return StoredArrays(self.folder / "params", self._record, hint=AGAIN)
