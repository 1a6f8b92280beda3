"""`polarjax sparsify`: learns routers and plans for a model directory from text, in one command."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polarjax.cli import learning
from polarjax.cli.decoding_options import Mesh
from polarjax.cli.inputs import bytes_of, random_key
from polarjax.errors import InputError
from polarjax.selection.plans import PlanTable, check_density
from polarjax.sparsity.options import CollectOptions, NeuronOptions
from polarjax.storage.atomic import absolute, check_writable

if TYPE_CHECKING:
    from polarjax.checkpoint.bundle import Bundle
    from polarjax.selection.routers import Routers
    from polarjax.sparsity.pipeline import SparsifyReport


Kept = Annotated[Path | None, typer.Option(help="Keep the activations, in this new folder.")]


def sparsify(
    folder: learning.Folder,
    text: learning.Texts,
    window: learning.Window = None,
    max_tokens: learning.MaxTokens = learning.MAX_TOKENS,
    max_gb: learning.MaxGb = learning.MAX_GB,
    fit: learning.Fit = False,
    validation: learning.Validation = learning.VALIDATION,
    test: learning.Test = learning.TEST,
    activations: Kept = None,
    head_density: learning.HeadDensity = 0.5,
    learning_rate: learning.LearningRate = learning.DEFAULTS.learning_rate,
    batch: learning.Batch = learning.DEFAULTS.neuron_batch,
    epochs: learning.Epochs = learning.DEFAULTS.max_epochs,
    head_objective: learning.Objective = None,
    rank_by: learning.RankBy = None,
    skipped: learning.Skipped = None,
    published: learning.Published = False,
    refine_tokens: learning.RefineTokens = None,
    target_recall: learning.Recall = 0.99,
    max_batch: learning.MaxBatch = learning.LARGEST_BATCH,
    dense_attention: learning.DenseAttention = "first",
    budgets: learning.Budgets = "uniform",
    shards: learning.Shards = 1,
    attention: learning.Attention = "groups",
    neurons: learning.Neurons = "relu",
    target_share: learning.TargetShare = NeuronOptions.target_share,
    seed: learning.Seed = 0,
    dtype: learning.Dtype = None,
    mesh: Mesh = None,
) -> dict[str, Any]:
    """Learn from text what the model can skip: collect, train-routers and calibrate in one command."""
    from polarjax.sparsity.checks import check_budgets
    from polarjax.sparsity.pipeline import learn

    _check_free(activations)
    check_density(head_density, where="head density")
    chosen = check_budgets(budgets, "--budgets")
    gated = learning.neuron_options(neurons, target_share)
    key = random_key(seed)
    collecting = CollectOptions(
        folder=activations,
        held_out=(validation, test),
        max_bytes=bytes_of(max_gb, "--max-gb"),
        fit=fit,
        **learning.head_options(rank_by, skipped, published),
    )
    training = learning.train_options(learning_rate, batch, epochs, head_objective, published)
    refinement = learning.refine_options(refine_tokens, published)
    calibration = learning.calibrate_options(target_recall, max_batch, dense_attention, shards, attention)
    bundle, windows = learning.load_and_cut(folder, text, window, max_tokens, dtype, mesh)
    _check_ready(folder, bundle, gated)
    recording = learning.announce(bundle, windows, collecting, in_parts=activations is None)
    stages: dict[str, Any] = {"collecting": collecting, "training": training, "neurons": gated}
    stages |= {"refinement": refinement, "calibration": calibration, "budgets": chosen}
    routers, plans, report = learn(bundle.model, windows, recording, key, head_density=head_density, **stages)
    _write(folder, routers, plans)
    _show(folder, plans, report, gated)
    return {"plans": plans.to_json(), **report.to_json()}


def _write(folder: Path, routers: "Routers", plans: PlanTable) -> None:
    from polarjax.checkpoint.learned import write_plans, write_routers

    write_routers(folder, routers)
    write_plans(folder, plans)


def _show(folder: Path, plans: PlanTable, report: "SparsifyReport", gated: NeuronOptions | None) -> None:
    learning.print_training(report.training)
    learning.print_refinement(report.refinement)
    learning.print_plans(plans, report.recall, measure="recall" if gated is None else "share kept")
    if gated is not None:
        learning.print_gated(plans, gated.target_share)
    shares = " ".join(f"{share:.3f}" for share in report.attention_importance)
    print(f"\nHow far each layer's attention turns the residual stream (1 - cos): {shares}")
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items())
    print(f"{spent}. Routers and plans are in {folder}. Next: polarjax generate {folder} --prompt TEXT")


def _check_ready(folder: Path, bundle: "Bundle", gated: NeuronOptions | None) -> None:
    """Raises unless the model has the neurons that are asked for, and its directory can be written."""
    from polarjax.sparsity.checks import check_gated

    if gated is not None:
        check_gated(bundle.model.config)
    check_writable(folder)


def _check_free(activations: Path | None) -> None:
    """Raises `InputError` if the folder for activations already exists."""
    if activations is not None and os.path.lexists(absolute(activations)):
        raise InputError(
            "the output already exists",
            where="--activations",
            got=activations,
            hint="choose another name, or remove it",
        )
