"""From a model and text to routers and plans: collect, train, calibrate, and measure on text held out from all."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np

from polarjax import types
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, InputError
from polarjax.generation.checks import random_key
from polarjax.model import decoder
from polarjax.model.checks import check_model, check_windows
from polarjax.selection.plans import PlanTable, check_density
from polarjax.selection.routers import Routers
from polarjax.sparsity.activations import Activations
from polarjax.sparsity.calibration import calibrate, measure_recall
from polarjax.sparsity.checks import check_options
from polarjax.sparsity.collection import (
    Recording,
    collect,
    plan_recording,
)
from polarjax.sparsity.options import CalibrateOptions, CollectOptions, TrainOptions
from polarjax.sparsity.training import TrainReport, train_routers
from polarjax.storage.atomic import temporary_folder

_ELSEWHERE = (
    "make room in the folder for temporary files, set TMPDIR to another one, or keep the activations in a folder of "
    "your choice (--activations)"
)


@dataclasses.dataclass(frozen=True)
class SparsifyReport:
    """What `sparsify` measured.

    Attributes:
      tokens: recorded, all parts together.
      num_bytes: of the activations.
      training: quality of the routers on the validation tokens.
      recall: of the plans on the test tokens, for each batch size of the table and each layer.
      attention_importance: of each layer, see `Activations.attention_importance`.
      seconds: of each stage.
    """

    tokens: int
    num_bytes: int
    training: TrainReport
    recall: tuple[tuple[float, ...], ...]
    attention_importance: tuple[float, ...]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)


def sparsify(
    model: "decoder.Decoder",
    windows: types.Int[np.ndarray, "n T"],
    key: types.Key[types.Array, ""],
    *,
    head_density: float = 0.5,
    collecting: CollectOptions | None = None,
    training: TrainOptions | None = None,
    calibration: CalibrateOptions | None = None,
) -> tuple[Routers, PlanTable, SparsifyReport]:
    """Learns a model's routers and plans from token windows.

    Args:
      model: the decoder; it is run densely.
      windows: int [n T], full windows of token ids.
      key: random key.
      head_density: fraction of groups that the group routers learn to pick, and the plans' default.
      collecting, training, calibration: options of the three stages.

    Returns:
      routers in the model's dtype, plans by batch size, and what was measured.

    Raises:
      InputError: bad windows, too little text, or activations larger than allowed.
      SparsityError: a bad density.
    """
    check_model(model, where="sparsify")
    collecting = check_options(collecting, CollectOptions, "collecting")
    training = check_options(training, TrainOptions, "training")
    calibration = check_options(calibration, CalibrateOptions, "calibration")
    key = random_key(key)
    check_density(head_density, where="head density")
    windows = check_windows(windows, model.config)
    recording = plan(model, windows.shape, collecting)
    check_length(recording, model.config, calibration)
    keys = jax.random.split(key, 3)
    seconds: dict[str, float] = {}
    with _folder(collecting) as folder:
        with _timed(seconds, "collect"):
            activations = _collect(model, windows, folder, collecting)
        with _timed(seconds, "train"):
            options = {"head_density": head_density, "options": training}
            routers, trained = train_routers(activations, model.config, keys[0], **options)
        with _timed(seconds, "calibrate"):
            options = {"head_density": head_density, "options": calibration}
            plans = calibrate(activations, routers, model.config, key=keys[1], **options)
        with _timed(seconds, "measure"):
            recall = measure_recall(activations, routers, plans, key=keys[2], options=calibration)
        importance = tuple(activations.attention_importance().tolist())
    report = SparsifyReport(len(recording.part), recording.num_bytes, trained, recall, importance, seconds)
    return routers, plans, report


def plan(model: "decoder.Decoder", shape: tuple[int, ...], options: CollectOptions) -> Recording:
    """What will be recorded of windows [n T] = `shape`."""
    return plan_recording(
        model.config,
        model.dtype,
        (shape[0], shape[1]),
        held_out=options.held_out,
        max_bytes=options.max_bytes,
        fit=options.fit,
    )


def check_length(recording: Recording, config: ModelConfig, options: CalibrateOptions) -> None:
    """Raises `InputError` when the held-out tokens do not fill the largest batch to be calibrated."""
    if not config.neuron_sparsity:
        return
    needed = options.batch_sizes[-1]
    for number, part in ((1, "validation"), (2, "test")):
        got = int(np.sum(recording.part == number))
        if got < needed:
            raise InputError(
                "the text is too short to calibrate",
                got=f"{got} {part} tokens of {len(recording.part)}",
                expected=f"at least {needed}, the largest batch size",
                hint="give a longer text, or hold out a larger part of it",
            )


def _collect(
    model: "decoder.Decoder", windows: np.ndarray, folder: types.Path, options: CollectOptions
) -> Activations:
    return collect(
        model,
        windows,
        folder,
        held_out=options.held_out,
        max_bytes=options.max_bytes,
        fit=options.fit,
        batch_size=options.batch_size,
    )


@contextmanager
def _folder(options: CollectOptions) -> Iterator[types.Path]:
    if options.folder is not None:
        yield options.folder
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder("polarjax-activations"))
        except OSError as error:
            got = error.strerror or str(error)
            raise CheckpointError("no temporary folder can be made", got=got, hint=_ELSEWHERE) from error
        try:
            yield folder / "activations"
        except CheckpointError as error:
            raise CheckpointError(error.what, where=error.where, got=error.got, hint=_ELSEWHERE) from error


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
