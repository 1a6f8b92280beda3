"""Learns routers and plans from text: collects, trains, refines, calibrates, then measures on unused text."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from polarjax.checkpoint.learned import kept_for
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, InputError
from polarjax.generation.checks import random_key
from polarjax.model import decoder
from polarjax.model.checks import check_model, check_windows
from polarjax.model.meshes import without_mesh
from polarjax.model.parameters import fingerprint
from polarjax.model.spread_checks import check_around
from polarjax.selection.plans import PlanTable, check_density
from polarjax.selection.routers import Routers
from polarjax.sparsity.budgets import with_budgets
from polarjax.sparsity.calibration import calibrate
from polarjax.sparsity.checks import check_budgets, check_gated, check_options
from polarjax.sparsity.collection import Recording, plan_recording, record
from polarjax.sparsity.footprint import planned
from polarjax.sparsity.gated_neurons import with_gated_neurons
from polarjax.sparsity.options import (
    Budgets,
    CalibrateOptions,
    CollectOptions,
    NeuronOptions,
    RefineOptions,
    TrainOptions,
)
from polarjax.sparsity.passes import Stages
from polarjax.sparsity.refinement import refine
from polarjax.sparsity.shards import with_group_order
from polarjax.sparsity.training import TrainReport, train_routers
from polarjax.sparsity.tuning import TuneReport
from polarjax.storage.atomic import temporary_folder
from polarjax.types import Array, Int, Int32, Key, Path

_ELSEWHERE = (
    "free space in the temporary folder, set TMPDIR to another one, or choose a folder for the activations "
    "(--activations)"
)


class StageKeys(NamedTuple):
    """Random keys of the stages, which are the same however the stages are run."""

    train: Key[Array, ""]
    refine: Key[Array, ""]
    calibrate: Key[Array, ""]
    measure: Key[Array, ""]

    @classmethod
    def of(cls, key: Key[Array, ""]) -> "StageKeys":
        """The keys that follow from one."""
        return cls(*jax.random.split(key, 4))


@dataclasses.dataclass(frozen=True)
class SparsifyReport:
    """What `sparsify` measured.

    Attributes:
      tokens: number of recorded tokens, all parts together.
      num_bytes: size of the activations.
      training: router quality on the validation tokens, before they are refined.
      refinement: what refining did; None if there was none.
      recall: recall of the plans on the test tokens, by batch size, then layer; for neurons of a model without ReLU, the
        share kept of the MLP output's norm.
      attention_importance: one value per layer, see `Activations.attention_importance`.
      seconds: time of each stage.
    """

    tokens: int
    num_bytes: int
    training: TrainReport
    refinement: TuneReport | None
    recall: tuple[tuple[float, ...], ...]
    attention_importance: tuple[float, ...]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)


def sparsify(
    model: "decoder.Decoder",
    windows: Int[np.ndarray, "n T"],
    key: Key[Array, ""],
    *,
    head_density: float = 0.5,
    collecting: CollectOptions | None = None,
    training: TrainOptions | None = None,
    refinement: RefineOptions | None = None,
    calibration: CalibrateOptions | None = None,
    budgets: Budgets = "uniform",
    neurons: NeuronOptions | None = None,
) -> tuple[Routers, PlanTable, SparsifyReport]:
    """Learns a model's routers and plans from token windows.

    Args:
      model: the decoder, run dense.
      windows: int [n T], full windows of token ids.
      key: random key.
      head_density: fraction of groups that group routers learn to pick; also the plans' default.
      collecting, training, refinement, calibration: see `polarjax.sparsity.options`; `RefineOptions(tokens=0)`: none.
      budgets: "calibrated" measures on validation windows how many groups each layer needs (`group_budgets`);
        "uniform" keeps as many in all, but equally many in every layer but the dense one, as published.
      neurons: how to learn the neurons of a model without ReLU (`with_gated_neurons`); None keeps its MLPs dense, which
        is seldom slower (bench/quality). ReLU models have their own way and no such options.

    Returns:
      Routers in the model's dtype, plans by batch size, and the measurements.

    Raises:
      InputError: bad windows, too little text, or activations larger than allowed.
      SparsityError: a bad density.
    """
    check_model(model, where="sparsify")
    check_around(model)
    collecting = check_options(collecting, CollectOptions, "collecting")
    training = check_options(training, TrainOptions, "training")
    refinement = check_options(refinement, RefineOptions, "refinement")
    calibration = check_options(calibration, CalibrateOptions, "calibration")
    key = random_key(key)
    check_density(head_density, where="head density")
    check_budgets(budgets, "sparsify")
    if neurons is not None:
        check_options(neurons, NeuronOptions, "neurons")
        check_gated(model.config)
    windows = check_windows(windows, model.config)
    recording = plan_recording(model, windows.shape, collecting, in_parts=collecting.folder is None)
    return learn(
        model,
        windows,
        recording,
        key,
        head_density=head_density,
        collecting=collecting,
        training=training,
        refinement=refinement,
        calibration=calibration,
        budgets=budgets,
        neurons=neurons,
    )


@without_mesh()
def learn(
    model: "decoder.Decoder",
    windows: Int32[np.ndarray, "n T"],
    recording: Recording,
    key: Key[Array, ""],
    *,
    head_density: float,
    collecting: CollectOptions,
    training: TrainOptions,
    refinement: RefineOptions,
    calibration: CalibrateOptions,
    budgets: Budgets = "uniform",
    neurons: NeuronOptions | None = None,
) -> tuple[Routers, PlanTable, SparsifyReport]:
    """`sparsify` with checked arguments; `recording` is what `plan_recording` returned for these windows."""
    calibration.check(model.config)
    check_validation(recording)
    if model.config.neuron_sparsity or neurons is not None:
        check_length(recording, calibration)
    keys = StageKeys.of(key)
    seconds: dict[str, float] = {}
    timed = partial(_timed, seconds)
    recording, collecting = planned(model, windows.shape, recording, collecting, training, calibration)
    stages = Stages(
        collecting, training, calibration, head_density, (keys.train, keys.calibrate, keys.measure), timed
    )
    with _folder(collecting) as folder:
        found = stages.run(model, windows, recording, folder)
        with timed("refine"):
            options: dict[str, Any] = {"head_density": head_density, "options": refinement}
            options |= {"dense_layers": found.plans.dense_layers, "budgets": budgets}
            routers, refined = refine(model, found.routers, found.text, keys.refine, **options)
        plans, recall = dataclasses.replace(found.plans, routers=routers.fingerprint), found.recall
        if found.text.num_tokens:  # else the groups stay where the routers of each pass put them
            plans = with_group_order(found.text, routers, plans)
        if budgets == "calibrated":
            with timed("calibrate"):
                plans = with_budgets(model, routers, found.text, plans)
        if neurons is not None:
            with timed("neurons"):
                routers, plans, recall = with_gated_neurons(
                    model, routers, plans, found.text, keys.measure, calibration=calibration, options=neurons
                )
    sizes = len(recording.part), recording.num_bytes
    importance = tuple(found.importance.tolist())
    report = SparsifyReport(*sizes, found.training, refined, recall, importance, seconds)
    return routers, plans, report


def learn_neurons(
    model: "decoder.Decoder",
    routers: Routers,
    plans: PlanTable | None,
    windows: Int32[np.ndarray, "n T"],
    key: Key[Array, ""],
) -> tuple[Routers, PlanTable | None]:
    """Routers and plans for new weights: group routers and the heads' settings stay, neurons are learned again.

    Neurons are calibrated for the batch sizes of `plans`; None means the default ones. Those of models without ReLU
    aren't learned; their MLPs become dense.
    """
    routers = dataclasses.replace(routers, weights=fingerprint(model))
    if not model.config.neuron_sparsity:
        layers = tuple(dataclasses.replace(layer, w_in=None, w_out=None) for layer in routers.layers)
        routers = dataclasses.replace(routers, layers=layers)
        if plans is not None:
            dense, all_kept = (None,) * plans.num_layers, (1.0,) * plans.num_layers
            sizes = len(plans.batch_sizes)
            plans = dataclasses.replace(plans, neurons=(dense,) * sizes, recall=(all_kept,) * sizes)
        return routers, kept_for(model.config, routers.weights, routers, plans)[1]
    keys = jax.random.split(key)
    options = CollectOptions()
    with _folder(options) as folder:
        activations = record(model, windows, plan_recording(model, windows.shape, options), folder)
        trained, _ = train_routers(activations, model.config, keys[0])
        layers = tuple(
            dataclasses.replace(old, w_in=new.w_in, w_out=new.w_out)
            for old, new in zip(routers.layers, trained.layers, strict=True)
        )
        routers = dataclasses.replace(routers, layers=layers)
        table = calibrate(activations, routers, model.config, key=keys[1], options=_as_before(plans))
    if plans is not None:
        kept = ("head_density", "dense_layers", "budgets", "group_shards", "order")
        table = dataclasses.replace(table, **{name: getattr(plans, name) for name in kept})
    return routers, table


def check_neuron_text(
    config: ModelConfig,
    windows: Int32[np.ndarray, "n T"],
    model: "decoder.Decoder",
    plans: PlanTable | None,
) -> None:
    """Raises `InputError` if `learn_neurons` would find too little text; for use before long work."""
    if config.neuron_sparsity:
        hint = "use a longer text, or sparsify again with a smaller --max-batch first"
        check_length(plan_recording(model, windows.shape, CollectOptions()), _as_before(plans), hint)


def _as_before(plans: PlanTable | None) -> CalibrateOptions:
    """The default options, for the batch sizes and devices of the plans, if there are any."""
    if plans is None:
        return CalibrateOptions()
    return CalibrateOptions(batch_sizes=plans.batch_sizes, shards=plans.neuron_shards)


def check_validation(recording: Recording) -> None:
    """Raises `InputError` if no tokens are held out for choosing epochs."""
    if not np.any(recording.part == 1):
        raise InputError(
            "no text is held out for choosing epochs",
            where="held_out",
            got="0 validation tokens",
            hint="raise the fraction of validation text (--validation)",
        )


def check_length(recording: Recording, options: CalibrateOptions, hint: str | None = None) -> None:
    """Raises `InputError` if there are fewer held-out tokens than the largest batch to calibrate."""
    needed = options.batch_sizes[-1]
    for number, part in ((1, "validation"), (2, "test")):
        got = int(np.sum(recording.part == number))
        if got < needed:
            raise InputError(
                "the text is too short to calibrate",
                got=f"{got} {part} tokens of {len(recording.part)}",
                expected=f"at least {needed}, the largest batch size",
                hint=hint or "use a longer text, hold out more of it, or lower --max-batch",
            )


@contextmanager
def _folder(options: CollectOptions) -> Iterator[Path]:
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
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
