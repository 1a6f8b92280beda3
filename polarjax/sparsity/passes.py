"""Learns the routers of a few layers at a time, as if the model had no others, and joins what was learned."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from polarjax.configs import ModelConfig
from polarjax.generation.checks import folded
from polarjax.model.decoder import Decoder
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import Routers
from polarjax.sparsity.activations import Activations
from polarjax.sparsity.calibration import calibrate, measure_recall
from polarjax.sparsity.collection import Recording, means_of, record
from polarjax.sparsity.options import CalibrateOptions, CollectOptions, TrainOptions
from polarjax.sparsity.training import Quality, TrainReport, train_routers
from polarjax.types import Array, Float, Int32, Key, Path


@dataclasses.dataclass(frozen=True)
class Learned:
    """What was learned of some layers.

    Attributes:
      routers, plans: theirs.
      training: quality on the validation tokens.
      recall: of the plans on the test tokens, by batch size, then layer.
      importance: see `Activations.attention_importance` [layers].
      text: the activations; if they were of some layers only, those of all without their rows: the text is left.
    """

    routers: Routers
    plans: PlanTable
    training: TrainReport
    recall: tuple[tuple[float, ...], ...]
    importance: Float[np.ndarray, "layers"]
    text: Activations


@dataclasses.dataclass(frozen=True)
class Stages:
    """How layers are learned.

    Attributes:
      collecting, training, calibration: options of the stages.
      head_density: fraction of groups that group routers learn to pick.
      keys: random keys of training, calibrating and measuring.
      timed: context of a stage, by its name.
    """

    collecting: CollectOptions
    training: TrainOptions
    calibration: CalibrateOptions
    head_density: float
    keys: tuple[Key[Array, ""], Key[Array, ""], Key[Array, ""]]
    timed: Callable[[str], AbstractContextManager[None]]

    def run(
        self, model: Decoder, windows: Int32[np.ndarray, "n T"], recording: Recording, folder: Path
    ) -> Learned:
        """Learns all layers, those of each of the recording's passes together; activations go to `folder`.

        Activations of some of the layers are removed again before the next are recorded.
        """
        if len(recording.parts) <= 1:
            return self._part(model, windows, recording, folder, self.keys)
        with self.timed("collect"):
            size = self.collecting.batch_size
            means = means_of(model, windows, recording, size) if recording.mean_outputs else None
        found = []
        for number, layers in enumerate(recording.parts):
            keys = tuple(folded(key, number) for key in self.keys)
            part = self._part(model, windows, recording, folder, keys, layers=layers, means=means)
            found.append(dataclasses.replace(part, text=text_alone(part.text, model.config)))
            del part  # the files' room is free once nothing maps them
            shutil.rmtree(folder)
        return joined(found, model.config, self.calibration)

    def _part(
        self,
        model: Decoder,
        windows: Int32[np.ndarray, "n T"],
        recording: Recording,
        folder: Path,
        keys: tuple[Any, ...],
        **which: Any,
    ) -> Learned:
        size = self.collecting.batch_size
        with self.timed("collect"):
            activations = record(model, windows, recording, folder, batch_size=size, **which)
        config, density = activations.config, self.head_density
        with self.timed("train"):
            options = {"head_density": density, "options": self.training}
            routers, trained = train_routers(activations, config, keys[0], **options)
        with self.timed("calibrate"):
            options = {"head_density": density, "options": self.calibration}
            plans = calibrate(activations, routers, config, key=keys[1], **options)
        with self.timed("measure"):
            recall = measure_recall(activations, routers, plans, key=keys[2], options=self.calibration)
        return Learned(routers, plans, trained, recall, activations.attention_importance(), activations)


def text_alone(activations: Activations, config: ModelConfig) -> Activations:
    """Activations of a model with this configuration that hold the text, and nothing of any token."""
    empty = lambda array, width: np.zeros((config.num_layers, 0, *width), array.dtype)
    return dataclasses.replace(
        activations,
        config=config,
        inputs=empty(activations.inputs, (config.d_model,)),
        activity=None,
        norms=None,
        change=None,
        part=activations.part[:0],
        means=None,
        windows=np.array(activations.windows),
        window_part=np.array(activations.window_part),
    )


def joined(parts: Sequence[Learned], config: ModelConfig, options: CalibrateOptions) -> Learned:
    """What was learned of all layers, from what was learned of the first ones, the next ones and so on."""
    first = parts[0]
    layers = tuple(layer for part in parts for layer in part.routers.layers)
    routers = dataclasses.replace(first.routers, layers=layers)
    rows = lambda tables: tuple(sum(row, ()) for row in zip(*tables, strict=True))
    importance = np.concatenate([part.importance for part in parts])
    plans = dataclasses.replace(
        first.plans,
        dense_layers=(0 if options.dense_attention == "first" else int(np.argmax(importance)),),
        num_layers=config.num_layers,
        neurons=rows(part.plans.neurons for part in parts),
        recall=rows(part.plans.recall for part in parts),
        order=sum((part.plans.order for part in parts), ()),
        routers=routers.fingerprint,
    )
    trained = [part.training for part in parts]
    neurons = [each.neurons for each in trained if each.neurons is not None]
    training = dataclasses.replace(
        first.training,
        neurons=_qualities(neurons) if neurons else None,
        groups=_qualities([each.groups for each in trained]),
    )
    return Learned(routers, plans, training, rows(part.recall for part in parts), importance, first.text)


def _qualities(parts: Sequence[Quality]) -> Quality:
    names = [field.name for field in dataclasses.fields(Quality)]
    return Quality(**{name: sum((getattr(part, name) for part in parts), ()) for name in names})
