"""Shared by `collect`, `train-routers`, `calibrate` and `sparsify`: options, reading text, printed tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer

from polarjax.cli.inputs import check_goes_with, placement, window_length
from polarjax.errors import InputError
from polarjax.selection.importance import check_importance
from polarjax.selection.plans import PlanTable
from polarjax.sparsity import options as choices
from polarjax.sparsity.options import (
    BATCH_SIZES,
    HELD_OUT,
    MAX_BYTES,
    CalibrateOptions,
    CollectOptions,
    RefineOptions,
    TrainOptions,
)
from polarjax.storage.atomic import check_writable
from polarjax.types import Int32

if TYPE_CHECKING:
    from polarjax.checkpoint.bundle import Bundle
    from polarjax.sparsity.activations import Activations
    from polarjax.sparsity.collection import Recording
    from polarjax.sparsity.training import TrainReport
    from polarjax.sparsity.tuning import TuneReport

REFINE = RefineOptions()

Folder = Annotated[Path, typer.Argument(help="A model directory.")]
Texts = Annotated[list[Path], typer.Option(help="A UTF-8 text (.txt, .txt.xz); may be given several times.")]
Window = Annotated[int | None, typer.Option(help="Tokens per window; default: up to 512.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum number of tokens to use, spread evenly.")]
MaxGb = Annotated[float, typer.Option(help="Maximum size of the activations on disk, in GB.")]
Fit = Annotated[bool, typer.Option("--fit", help="Record fewer tokens if all would exceed --max-gb.")]
Validation = Annotated[
    float, typer.Option(help="Fraction of the text held out for choosing epochs and plans.")
]
Test = Annotated[float, typer.Option(help="Fraction of the text held out for measuring the plans.")]
Dtype = Annotated[str | None, typer.Option(help="Dtype to compute in; default: as stored.")]
Recorded = Annotated[Path, typer.Option(help="Activations that polarjax collect wrote.")]
HeadDensity = Annotated[float, typer.Option(help="Fraction of heads (groups) to keep.")]
LearningRate = Annotated[float, typer.Option(help="AdamW's learning rate.")]
Batch = Annotated[int, typer.Option(help="Tokens per training step.")]
Epochs = Annotated[int, typer.Option(help="Maximum number of passes over the training tokens.")]
Recall = Annotated[float, typer.Option(help="Fraction of the active neurons that plans must keep.")]
MaxBatch = Annotated[int, typer.Option(help="Largest batch size to make a plan for.")]
Objective = Annotated[
    str | None,
    typer.Option(
        help="What head routers learn: importance (how important each head is; the default), top (which heads are "
        "the most important)."
    ),
]
RankBy = Annotated[
    str | None,
    typer.Option(
        help="How important a head is: contributions (the norm of what leaves the layer; the default), norms (that "
        "before the output projection)."
    ),
]
Skipped = Annotated[
    str | None,
    typer.Option(help="What replaces a head that is skipped: mean (its mean output; the default), zeros."),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="The published choices for heads: norms, zeros, top and no refinement, unless given otherwise.",
    ),
]
RefineTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of training text that head routers are refined on, by distillation under their own choices; 0: "
        f"none. Default: {REFINE.passes} passes over the text, at most {REFINE.most_tokens:,} tokens."
    ),
]
DenseAttention = Annotated[
    str,
    typer.Option(
        help="The layer whose attention skips nothing: first, or important (whose attention changes the most)."
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        help="Heads kept in each layer: uniform (as many in every layer but the dense one), calibrated (as many in all, "
        "more in the layers that need them on this text)."
    ),
]
Shards = Annotated[
    int,
    typer.Option(
        help="Devices that share each layer; all of them keep the same number of neurons and of heads."
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        help="With --shards: groups (each device attends with its own heads) or sequences (with all, for its own "
        "sequences)."
    ),
]
Neurons = Annotated[
    str,
    typer.Option(
        help="Whose neurons to learn: relu (of ReLU models; the default), gated (of models without ReLU too, which "
        "seldom pays: see what it prints)."
    ),
]
TargetShare = Annotated[
    float, typer.Option(help="With --neurons gated: share of the MLP output's norm that plans must keep.")
]
Seed = Annotated[int, typer.Option(help="Random seed.")]

MAX_TOKENS = 65_536
MAX_GB = MAX_BYTES / 1e9
VALIDATION, TEST = HELD_OUT
LARGEST_BATCH = BATCH_SIZES[-1]
DEFAULTS = TrainOptions()


def load_and_cut(
    folder: Path, text: list[Path], window: int | None, max_tokens: int, dtype: str | None, mesh: str | None
) -> tuple["Bundle", Int32[np.ndarray, "n T"]]:
    """Loads the model directory, onto a mesh if there is one, and cuts the texts into token windows."""
    from polarjax.checkpoint.loading import load_with_tokenizer
    from polarjax.text.corpus import read_text
    from polarjax.text.token_windows import text_windows

    texts = [read_text(path) for path in text]
    bundle, tokenizer = load_with_tokenizer(folder, dtype, to_learn=True, **placement(mesh, None))
    length = window_length(window, bundle.model.config)
    source = ", ".join(map(str, text))
    return bundle, text_windows(texts, tokenizer, length, most=max_tokens // max(length, 1), source=source)


def announce(
    bundle: "Bundle", windows: Int32[np.ndarray, "n T"], options: CollectOptions, *, in_parts: bool = False
) -> "Recording":
    """Checks the windows, plans their recording, and prints how much will be recorded."""
    from polarjax.model.checks import check_windows
    from polarjax.sparsity.collection import plan_recording

    check_windows(windows, bundle.model.config)
    recording = plan_recording(bundle.model, windows.shape, options, in_parts=in_parts)
    count, length = windows.shape
    print(f"{count} windows of {length} tokens; recording {recording}")
    return recording


def open_for(folder: Path, activations: Path, *, routers: bool = False) -> "tuple[Bundle, Activations]":
    """Opens a model directory that the result will be written to, and activations recorded from it.

    Skips what is about to be replaced: the plans and, unless `routers`, the routers.

    Raises:
      CheckpointError: the directory can't be read or written.
      SparsityError: the activations were recorded from another model.
    """
    from polarjax.checkpoint.loading import load_to_learn
    from polarjax.model.parameters import fingerprint
    from polarjax.sparsity.activations import open_activations

    recorded = open_activations(activations)
    bundle = load_to_learn(folder, dtype=recorded.dtype, routers=routers)
    recorded.check(bundle.model.config, fingerprint(bundle.model))
    check_writable(folder)
    return bundle, recorded


def head_options(rank_by: str | None, skipped: str | None, published: bool) -> dict[str, Any]:
    """The fields of `CollectOptions` that these set."""
    chosen = dict(choices.PUBLISHED) if published else {}
    if rank_by is not None:
        chosen["importance"] = check_importance(rank_by, "--rank-by")
    if skipped not in (None, "mean", "zeros"):
        raise InputError(
            "nothing that could replace a head",
            where="--skipped",
            got=skipped,
            expected="mean | zeros",
            hint="leave it out to take the mean outputs",
        )
    return chosen if skipped is None else chosen | {"mean_outputs": skipped == "mean"}


def train_options(
    learning_rate: float, batch: int, epochs: int, objective: str | None, published: bool = False
) -> TrainOptions:
    """The default options with these from the command line."""
    usual = choices.PUBLISHED_OBJECTIVE if published else DEFAULTS.group_objective
    return TrainOptions(
        learning_rate=learning_rate,
        neuron_batch=batch,
        group_batch=batch,
        max_epochs=epochs,
        group_objective=usual if objective is None else cast(choices.Objective, objective),
    )


def refine_options(tokens: int | None, published: bool = False) -> RefineOptions:
    """The default options with this from the command line."""
    return RefineOptions(tokens=0 if tokens is None and published else tokens)


def calibrate_options(
    target_recall: float, max_batch: int, dense_attention: str, shards: int = 1, attention: str = "groups"
) -> CalibrateOptions:
    """The published options with these, and batch sizes that are powers of two up to `max_batch`."""
    if max_batch < 1:
        raise InputError(
            "no batch size to make a plan for",
            where="--max-batch",
            got=max_batch,
            expected="1 or more",
            hint=f"leave it out to make plans up to {LARGEST_BATCH}",
        )
    sizes = tuple(2**i for i in range(max_batch.bit_length()))
    made = CalibrateOptions(
        batch_sizes=sizes,
        target_recall=target_recall,
        dense_attention=cast(choices.DenseAttention, dense_attention),
        shards=shards,
        attention=cast(choices.Attention, attention),
    )
    check_goes_with("--attention", attention != "groups", "--shards", shards > 1)
    return made


def neuron_options(neurons: str, target_share: float) -> choices.NeuronOptions | None:
    """The default options with this target; None for "relu"."""
    if neurons not in ("relu", "gated"):
        hint = "leave it out for those of ReLU models"
        raise InputError(
            "no such neurons", where="--neurons", got=neurons, expected="relu | gated", hint=hint
        )
    return choices.NeuronOptions(target_share=target_share) if neurons == "gated" else None


def print_training(report: "TrainReport") -> None:
    """Prints the quality on validation tokens, one line per layer."""
    print(f"\nRouters, measured on {report.validation_tokens:,} validation tokens")
    print("layer   neurons: recall  precision     f1   groups: recall  precision     f1   top groups found")
    groups, neurons = report.groups, report.neurons
    for i in range(len(groups.recall)):
        of_neurons = " " * 16 + "not routed".rjust(15)
        if neurons is not None:
            of_neurons = f"{neurons.recall[i]:16.3f}{neurons.precision[i]:11.3f}{neurons.f1[i]:7.3f}"
        print(
            f"{i:5}{of_neurons}{groups.recall[i]:17.3f}{groups.precision[i]:11.3f}{groups.f1[i]:7.3f}"
            f"{groups.selected[i]:19.3f}"
        )


def print_refinement(report: "TuneReport | None") -> None:
    """Prints what refining did, if there was any."""
    if report is None:
        return
    print(f"\nHead routers, refined on {report.tokens:,} tokens in {report.seconds:.0f} s")
    print_perplexities(report, "validation")


def print_perplexities(report: "TuneReport", part: str, activation: str | None = None) -> None:
    """Prints the perplexities before and after, one line per number of heads kept; both with a new activation."""
    both = f", before and after with {activation}" if activation else ""
    print(f"Perplexity on the {part} windows, by heads (groups) kept in every layer that skips{both}")
    print("kept    before     after")
    for kept, before in report.before.items():
        print(f"{kept:4}{before:10.3f}{report.after[kept]:10.3f}")


def print_neurons(table: PlanTable) -> None:
    """Prints at which batch sizes skipping neurons can pay."""
    means = [_mean_kept(table, counts) for counts in table.neurons]
    found = zip(table.batch_sizes, means, strict=True)
    skipped = [f"{mean:.0%} at batch size {size}" for size, mean in found if mean < 1]
    kept = ", ".join(skipped) if skipped else "all at every batch size"
    rest = ", and all at larger ones, which gain nothing from it" if skipped and means[-1] == 1 else ""
    print(f"Neurons that the plans keep: {kept}{rest}.")


def _mean_kept(table: PlanTable, counts: Sequence[int | None]) -> float:
    return float(np.mean([(count or table.num_neurons) / table.num_neurons for count in counts]))


def print_gated(table: PlanTable, target_share: float) -> None:
    """Prints whether skipping neurons of a model without ReLU can pay."""
    sizes = [size for size, row in zip(table.batch_sizes, table.neurons, strict=True) if any(row)]
    where = f"at batch sizes up to {sizes[-1]}" if sizes else "at no batch size"
    print(
        f"MLPs skip neurons {where}; the target is {target_share:.0%} of their output's norm. Without ReLU this seldom "
        "pays: on SmolLM2-135M even a perfect choice of half of the neurons costs +2.9 % perplexity at batch 1, +17 % "
        "at 4 and +50 % at 16, a router's far more (bench/quality). tune --activation relu makes neurons that can be "
        "skipped."
    )


def print_plans(table: PlanTable, recall: tuple[tuple[float, ...], ...], *, measure: str = "recall") -> None:
    """Prints the neurons kept in each layer, one line per batch size; `recall` is measured on the test tokens."""
    dense = ", ".join(map(str, table.dense_layers))
    spread = ", spread over layers by what each needs" if table.budgets else ""
    print(
        f"\nHeads kept: {table.head_density:.0%} in every layer but {dense}{spread}, unless generate gets "
        "--head-density"
    )
    _print_shards(table)
    print(f"Neurons kept of {table.num_neurons}, by batch size (all: the layer is dense)")
    rows = zip(table.batch_sizes, table.neurons, recall, strict=True)
    for size, counts, found in rows:
        kept = " ".join(f"{'all' if count is None else count:>6}" for count in counts)
        mean = _mean_kept(table, counts)
        print(
            f"batch {size:5}: {kept}   mean {mean:4.0%}, {measure} {np.mean(found):.3f}, least {min(found):.3f}"
        )


def _print_shards(table: PlanTable) -> None:
    """Prints how devices share what is kept, if they do."""
    if table.skips_no_groups:
        print(
            f"Each of {table.group_shards} devices has a single head (group), so none can be skipped; "
            "--attention sequences skips them"
        )
    elif table.group_shards > 1:
        print(f"Each of {table.group_shards} devices keeps as many heads of its own, rounded up")
    if table.neuron_shards > 1:
        print(f"Each of {table.neuron_shards} devices keeps as many neurons of its own")
