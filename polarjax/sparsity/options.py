"""Options of collecting, training and calibrating, with their checks. No JAX, so that help can show the defaults."""

import dataclasses
import math
from typing import Any, Literal, get_args

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model.mesh_shape import Attention, MeshShape
from polarjax.numeric import items, make_plain, shown, whole_number
from polarjax.selection.importance import Importance, check_importance
from polarjax.types import Path

_TINY = 1e-300
MAX_BYTES = 32 * 10**9
HELD_OUT = (0.1, 0.05)
"""Fractions for (validation, test). Plans are calibrated on validation text, so it is twice the published 5 %."""

Objective = Literal["importance", "top"]
PUBLISHED: dict[str, Any] = {"importance": "norms", "mean_outputs": False}
"""The published values of `CollectOptions` where they aren't the defaults."""
PUBLISHED_OBJECTIVE: Objective = "top"
DenseAttention = Literal["first", "important"]
Budgets = Literal["uniform", "calibrated"]
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """How activations are collected; see `polarjax.sparsity.collect`.

    Attributes:
      folder: where to keep them; None deletes them after use.
      held_out: fractions of the windows for (validation, test).
      max_bytes: limit on their size on disk.
      fit: above the limit, record fewer positions instead of raising.
      batch_size: windows per forward pass.
      importance: what makes a group important; published: "norms".
      mean_outputs: measure the mean output of each group, which then replaces the group where it is skipped;
        published: False, which replaces it by zeros.
    """

    folder: Path | None = None
    held_out: tuple[float, float] = HELD_OUT
    max_bytes: int = MAX_BYTES
    fit: bool = False
    batch_size: int = 8
    importance: Importance = "contributions"
    mean_outputs: bool = True

    def __post_init__(self) -> None:
        make_plain(self, "max_bytes", "fit", "batch_size", "mean_outputs")
        check_importance(self.importance, "CollectOptions")
        whole_number(self.batch_size, "batch_size", where="CollectOptions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How routers are trained; the defaults are the published ones, except for `group_objective`.

    Attributes:
      learning_rate, weight_decay: AdamW's.
      neuron_batch, group_batch: tokens per step, for the neuron and the group routers.
      max_epochs: maximum number of passes over the training tokens.
      patience: a layer stops after this many epochs without improvement on the validation tokens.
      good_enough: a layer stops when its f1 (neurons) or `selected` (groups, objective "top") exceeds this.
      group_objective: what the group routers learn: "importance", or "top" as published; see `GroupTask`.
      rank: R of the neuron routers; None means `router_rank(config)`.
      memory_bytes: training tokens stay on the device up to this size; above it, they are read from disk.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    neuron_batch: int = 64
    group_batch: int = 64
    max_epochs: int = 20
    patience: int = 5
    good_enough: float = 0.99
    group_objective: Objective = "importance"
    rank: int | None = None
    memory_bytes: int = 4 * 10**9

    def __post_init__(self) -> None:
        if self.group_objective not in get_args(Objective):
            expected = " | ".join(get_args(Objective))
            raise InputError(
                "no such objective",
                where="group objective",
                got=self.group_objective,
                expected=expected,
                hint="leave it out to learn the importance of each head",
            )
        whole = ("neuron_batch", "group_batch", "max_epochs", "patience", "memory_bytes")
        make_plain(self, *whole, "learning_rate", "weight_decay", "good_enough", "rank")
        for name in (*whole, *(["rank"] if self.rank is not None else [])):
            whole_number(getattr(self, name), name, where="TrainOptions")
        for name, least in (("learning_rate", _TINY), ("weight_decay", 0), ("good_enough", 0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value < math.inf:
                raise _unusable(self, name, "above 0" if least else "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """How group routers and means are refined by distillation; see `polarjax.sparsity.refinement.refine`.

    Attributes:
      tokens: tokens of training text; None means `passes` over it, at most `most_tokens`; 0, as published, leaves the
        routers as they were trained.
      passes, most_tokens: how much text is used when `tokens` is None.
      spread: routers learn to keep `head_density` - `spread` to `head_density` + `spread` of the groups; each window
        draws one number of groups from this range.
      batch_tokens: tokens per step of the optimizer, rounded down to whole windows, at least one.
      router_rate: Adam's learning rate for the routers at its highest, times the model's width D.
      mean_rate: that for the means, as a fraction of their root mean square.
      warmup: steps until the learning rates are at their highest.
    """

    tokens: int | None = None
    passes: int = 4
    most_tokens: int = 1_000_000
    spread: float = 1 / 6
    batch_tokens: int = 512
    router_rate: float = 1.25
    mean_rate: float = 0.2
    warmup: int = 10

    def __post_init__(self) -> None:
        whole = ("passes", "most_tokens", "batch_tokens", "warmup")
        make_plain(self, *whole, "tokens", "spread", "router_rate", "mean_rate")
        for name in whole:
            whole_number(getattr(self, name), name, where="RefineOptions")
        if self.tokens is not None:
            whole_number(self.tokens, "refine tokens", where="RefineOptions", least=0)
        for name, most in (("router_rate", math.inf), ("mean_rate", math.inf), ("spread", 1)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < most:
                raise _unusable(self, name, "above 0" if most == math.inf else "above 0, below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronOptions:
    """How neurons of models without ReLU are learned; see `polarjax.sparsity.gated_neurons.with_gated_neurons`.

    Attributes:
      target_share: share of the MLP output's norm that plans keep (`polarjax.sparsity.kept_share.kept_share`).
      epochs: passes over the training tokens.
      batch: tokens per step.
      learning_rate: Adam's, at the first step; it falls as a cosine.
      rank: R of the routers; None means a quarter of D, at most 1024.
      memory_bytes: limit on a layer's inputs at the training tokens; training windows above it are left out.
    """

    target_share: float = 0.9
    epochs: int = 4
    batch: int = 128
    learning_rate: float = 1e-3
    rank: int | None = None
    memory_bytes: int = 4 * 10**9

    def __post_init__(self) -> None:
        whole = ("epochs", "batch", "memory_bytes", *(["rank"] if self.rank is not None else []))
        make_plain(self, *whole, "target_share", "learning_rate")
        for name in whole:
            whole_number(getattr(self, name), name, where="NeuronOptions")
        for name, most in (("target_share", 1), ("learning_rate", math.inf)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < most:
                raise _unusable(self, name, "above 0, below 1" if most == 1 else "above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """How plans are calibrated.

    Attributes:
      batch_sizes: batch sizes that get a plan, increasing.
      target_recall: mean over batches of the fraction of truly active neurons that are kept; published: 0.99.
      multiple: k is rounded up to a multiple of this (at most F).
      num_batches: random batches per batch size.
      max_tokens: maximum number of held-out tokens used.
      dense_attention: the layer whose attention keeps all groups. "first" is the published choice, made for models
        whose first layer's attention turns the residual stream by far the most. "important" picks the layer that
        does so in this model (`Activations.attention_importance`).
      shards: devices that each keep the same number of their own neurons; a plan made for several selects in the same
        way on one.
      attention: "groups" if each of these devices has groups of its own and keeps the same number of them; "sequences"
        if each attends with all groups, for its own sequences.
    """

    batch_sizes: tuple[int, ...] = BATCH_SIZES
    target_recall: float = 0.99
    multiple: int = 128
    num_batches: int = 256
    max_tokens: int = 8192
    dense_attention: DenseAttention = "first"
    shards: int = 1
    attention: Attention = "groups"

    def __post_init__(self) -> None:
        make_plain(self, "target_recall", "multiple", "num_batches", "max_tokens", "shards")
        MeshShape(
            model=whole_number(self.shards, "shards", where="CalibrateOptions"), attention=self.attention
        )
        sizes = items(self.batch_sizes) or ()
        counting = all(type(size) is int and size > 0 for size in sizes)
        if not sizes or not counting or list(sizes) != sorted(set(sizes)):
            got = shown(self.batch_sizes)
            expected, hint = "increasing whole numbers from 1", "pass for example batch_sizes=(1, 8)"
            raise InputError(
                "unusable batch sizes", where="CalibrateOptions", got=got, expected=expected, hint=hint
            )
        object.__setattr__(self, "batch_sizes", sizes)
        if type(self.target_recall) not in (int, float) or not 0 < self.target_recall <= 1:
            raise _unusable(self, "target_recall", "above 0, at most 1")
        if self.dense_attention not in get_args(DenseAttention):
            expected = " | ".join(get_args(DenseAttention))
            raise InputError(
                "no such choice of a dense layer",
                where="dense attention",
                got=self.dense_attention,
                expected=expected,
                hint="leave it out to take the first",
            )
        for name in ("multiple", "num_batches", "max_tokens"):
            whole_number(getattr(self, name), name, where="CalibrateOptions")

    def check(self, config: ModelConfig) -> None:
        """Raises `InputError` unless the model can be divided into so many shards."""
        MeshShape(model=self.shards).check(config, where="shards")


def _unusable(options: Any, name: str, expected: str) -> InputError:
    """The error for a field's value that is out of its range."""
    kind, got = type(options), shown(getattr(options, name))
    hint = f"leave it out to take {getattr(kind, name):g}"
    return InputError(f"{name} is not usable", where=kind.__name__, got=got, expected=expected, hint=hint)
