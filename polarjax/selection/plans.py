"""How many neurons and groups each layer keeps."""

import bisect
import dataclasses
import math
from typing import Any

import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import SparsityError
from polarjax.numeric import check_type, items, plain, shown, whole_number
from polarjax.selection.shard_checks import check_order, check_shards
from polarjax.selection.table_checks import as_calibrated, as_layers, check_budget_rows


def dense_above(batch_size: int) -> float:
    """Fraction of a layer's neurons above which calibration keeps the layer dense at a batch size.

    .8 is the published value. On an H200 (bench/results/sparse_mlp.jsonl), dense is faster above .83 at batches of 1
    to 64 (for some shapes never); at 256, where matmuls are compute-bound, above .29 (OPT-6.7B) to .63 (OPT-66B).
    Batches in between were not measured. In a whole step, the router's own bytes count, too: with .62 of the neurons,
    OPT-6.7B's at batch 64 takes 1 % longer than with all; with .49, a layer of OPT-66B takes 12 % less
    (bench/results/decode.jsonl).
    """
    return 0.8 if batch_size <= 128 else 0.3


def check_density(density: float, *, where: str) -> float:
    """Returns `density`; raises `SparsityError` unless 0 < density <= 1."""
    density = plain(density)
    if not (isinstance(density, int | float) and 0 < density <= 1):
        raise SparsityError(
            "not a density, the fraction that is kept",
            where=where,
            got=repr(density),
            expected="above 0 and at most 1",
            hint="pass for example 0.5",
        )
    return float(density)


def _as_counts(name: str, counts: Any) -> tuple[int | None, ...]:
    """A tuple, list or array of counts as a tuple of int or None, so that the plan is static and hashable."""
    given, counts = counts, items(counts)
    if counts is None:
        raise SparsityError(
            f"the numbers of {name} are not a tuple",
            where="sparsity plan",
            got=shown(given),
            expected="one number, or None, for each layer",
            hint="pass a tuple",
        )
    for layer, count in enumerate(counts):
        if count is not None and not (type(count) is int and count > 0):
            raise SparsityError(
                f"layer {layer} has an invalid number of {name}",
                where="sparsity plan",
                got=repr(count),
                expected="a positive whole number, or None for a dense layer",
                hint="correct the plan",
            )
    return counts


@dataclasses.dataclass(frozen=True)
class SparsityPlan:
    """Static: how many neurons and groups each layer keeps; None means that the layer is dense.

    Attributes:
      neurons: L entries, neurons kept (k) in each layer's MLP.
      groups: L entries, groups kept (k) in each layer's attention.
      neuron_shards: number of equal blocks of neurons, in order, each of which keeps its best k / neuron_shards.
      group_shards: the same for groups.
      batch_shards: number of equal parts of a batch, consecutive rows, each of which chooses its own neurons.
      group_order: for each layer, the K groups in the order of the blocks that they belong to; () is the model's order.
    """

    neurons: tuple[int | None, ...]
    groups: tuple[int | None, ...]
    neuron_shards: int = 1
    group_shards: int = 1
    batch_shards: int = 1
    group_order: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("neuron_shards", "group_shards", "batch_shards"):
            number = whole_number(getattr(self, name), name, where="sparsity plan", error=SparsityError)
            object.__setattr__(self, name, number)
        for name in ("neurons", "groups"):
            object.__setattr__(self, name, _as_counts(name, getattr(self, name)))
        if len(self.neurons) != len(self.groups):
            raise SparsityError(
                "the plan's two halves cover different numbers of layers",
                where="sparsity plan",
                got=f"{len(self.neurons)} for neurons, {len(self.groups)} for groups",
                expected="equal lengths",
                hint="give one entry for each layer in both",
            )
        check_shards("neurons", self.neurons, self.neuron_shards, where="sparsity plan")
        check_shards("groups", self.groups, self.group_shards, where="sparsity plan")

    def check(self, config: ModelConfig) -> None:
        """Raises `SparsityError` unless the plan fits a model of this configuration."""
        check_type(config, ModelConfig, where="sparsity plan", hint="pass model.config")
        if len(self.groups) != config.num_layers:
            raise SparsityError(
                "the plan is for another number of layers",
                where="sparsity plan",
                got=f"{len(self.groups)} layers",
                expected=f"{config.num_layers}",
                hint="calibrate this model: polarjax sparsify",
            )
        for name, counts, most in (
            ("neurons", self.neurons, config.d_ff),
            ("groups", self.groups, config.num_kv_heads),
        ):
            kept = max((count for count in counts if count is not None), default=0)
            if kept > most:
                raise SparsityError(
                    f"the plan keeps more {name} than there are",
                    where="sparsity plan",
                    got=str(kept),
                    expected=f"at most {most}",
                    hint="calibrate this model: polarjax sparsify",
                )
        check_shards("neurons", (config.d_ff,), self.neuron_shards, where="sparsity plan")
        check_shards("groups", (config.num_kv_heads,), self.group_shards, where="sparsity plan")
        check_order(self.group_order, config.num_layers, config.num_kv_heads, where="sparsity plan")

    def for_device(self, *, neuron_parts: int, group_parts: int) -> "SparsityPlan":
        """What each device of a mesh keeps of its neurons and groups, of which it has one part in so many."""
        part = lambda counts, parts: tuple(count and count // parts for count in counts)
        return dataclasses.replace(
            self,
            neurons=part(self.neurons, neuron_parts),
            groups=part(self.groups, group_parts),
            neuron_shards=1 if neuron_parts > 1 else self.neuron_shards,
            group_shards=1 if group_parts > 1 else self.group_shards,
            batch_shards=1,
        )

    def order(self, layer: int) -> tuple[int, ...] | None:
        """The layer's `group_order`; None is the model's."""
        return self.group_order[layer] if self.group_order and self.group_shards > 1 else None


def dense_plan(config: ModelConfig) -> SparsityPlan:
    """The plan that keeps everything."""
    return SparsityPlan((None,) * config.num_layers, (None,) * config.num_layers)


def groups_kept(density: float, groups: int) -> int:
    """The number of groups that a density keeps of so many: rounded down, at least 1."""
    return max(1, math.floor(density * groups + 1e-9))


def uniform_groups(
    config: ModelConfig, density: float, *, dense_layers: tuple[int, ...] = (0,)
) -> tuple[int | None, ...]:
    """The default group counts: `floor(density * K)`, at least 1, in every layer but `dense_layers`.

    Density 1.0 selects all K groups by index: it runs the sparse path and equals the dense model.

    Raises:
      SparsityError: the density is not above 0 and at most 1.
    """
    density = check_density(density, where="head density")
    kept = groups_kept(density, config.num_kv_heads)
    return tuple(None if layer in dense_layers else kept for layer in range(config.num_layers))


@dataclasses.dataclass(frozen=True)
class PlanTable:
    """Calibrated plans by batch size, and the shape of their model.

    Attributes:
      num_layers, num_neurons, num_groups: L, F, K of the model.
      batch_sizes: increasing.
      neurons: for each batch size, neurons kept (k) in each layer (None = dense).
      recall: for each batch size, the measured recall of the truly active neurons in each layer; in models without ReLU,
        the share kept of the MLP output's norm (`polarjax.sparsity.kept_share`).
      head_density: default density of groups in every layer but `dense_layers`.
      dense_layers: layers whose attention keeps all groups.
      budgets: groups that each layer keeps instead, with the same sum: row k - 1 replaces k groups in every layer but
        `dense_layers`; () keeps these uniform counts.
      neuron_shards, group_shards: as in `SparsityPlan`.
      order: for each layer, the K groups in the order of the blocks that they belong to; () keeps the model's order.
      weights, routers: fingerprints of the model and routers they were calibrated for, "" if unknown.
    """

    num_layers: int
    num_neurons: int
    num_groups: int
    batch_sizes: tuple[int, ...]
    neurons: tuple[tuple[int | None, ...], ...]
    recall: tuple[tuple[float, ...], ...]
    head_density: float = 0.5
    dense_layers: tuple[int, ...] = (0,)
    budgets: tuple[tuple[int, ...], ...] = ()
    neuron_shards: int = 1
    group_shards: int = 1
    order: tuple[tuple[int, ...], ...] = ()
    weights: str = dataclasses.field(default="", compare=False)
    routers: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_density", check_density(self.head_density, where="plan table"))
        for name in ("num_layers", "num_neurons", "num_groups"):
            number = whole_number(getattr(self, name), name, where="plan table", error=SparsityError)
            object.__setattr__(self, name, number)
        checked = {
            "dense_layers": as_layers(self.dense_layers, self.num_layers),
            **as_calibrated(self.batch_sizes, self.neurons, self.recall),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for counts in self.neurons:
            SparsityPlan(counts, (None,) * self.num_layers, self.neuron_shards, self.group_shards)
        check_shards("neurons", (self.num_neurons,), self.neuron_shards, where="plan table")
        check_shards("groups", (self.num_groups,), self.group_shards, where="plan table")
        check_order(self.order, self.num_layers, self.num_groups, where="plan table")
        check_budget_rows(self.budgets, self.num_layers, self.num_groups, where="plan table")

    def check(self, config: ModelConfig) -> None:
        """Raises `SparsityError` unless the table was calibrated for a model of this shape."""
        check_type(config, ModelConfig, where="plan table", hint="pass model.config")
        got = (self.num_layers, self.num_neurons, self.num_groups)
        expected = (config.num_layers, config.d_ff, config.num_kv_heads)
        if got != expected:
            raise SparsityError(
                "the plans are for another model",
                where="plan table",
                got="{} layers, {} neurons, {} groups".format(*got),
                expected="{}, {}, {}".format(*expected),
                hint="run polarjax sparsify on this model directory",
            )
        for counts in self.neurons:
            SparsityPlan(counts, (None,) * self.num_layers, self.neuron_shards).check(config)

    @property
    def selects_neurons(self) -> bool:
        """Whether a plan chooses neurons, which is done for all rows of a batch together."""
        return any(count is not None for row in self.neurons for count in row)

    def for_batch(
        self,
        batch_size: int,
        config: ModelConfig,
        head_density: float | None = None,
        *,
        batch_shards: int = 1,
    ) -> SparsityPlan:
        """The plan of the smallest calibrated batch size that fits; above the largest, MLPs are dense.

        Args:
          batch_size: B to decode.
          config: the model's configuration.
          head_density: overrides the table's default.
          batch_shards: equal parts of the batch, such as those of a mesh's axis `data`; the plan is the one for a part.

        Raises:
          InputError: `batch_size` is not a positive whole number.
          SparsityError: the table is for another model, or the density is not one.
        """
        batch_size = whole_number(batch_size, "batch_size", where="for_batch")
        self.check(config)
        density = self.head_density if head_density is None else head_density
        row = bisect.bisect_left(self.batch_sizes, -(-batch_size // batch_shards))
        dense = (None,) * self.num_layers
        return SparsityPlan(
            self.neurons[row] if row < len(self.neurons) else dense,
            self._groups(config, density),
            self.neuron_shards,
            self.group_shards,
            batch_shards,
            self.order,
        )

    def _groups(self, config: ModelConfig, density: float) -> tuple[int | None, ...]:
        """Groups kept in each layer at this density, rounded up to what all shards can keep equally."""
        uniform = uniform_groups(config, density, dense_layers=self.dense_layers)
        kept = next((count for count in uniform if count is not None), self.num_groups)
        if kept == self.num_groups:
            return uniform
        counts = self.budgets[kept - 1] if self.budgets else uniform
        return tuple(count and self._kept_by_shards(count) for count in counts)

    def _kept_by_shards(self, count: int) -> int | None:
        """The count rounded up to a multiple of `group_shards`; None if these are all groups."""
        rounded = -(-count // self.group_shards) * self.group_shards
        return None if rounded == self.num_groups else rounded

    @property
    def skips_no_groups(self) -> bool:
        """Whether every shard has a single group, so that nothing can be skipped."""
        return 1 < self.num_groups == self.group_shards

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into an equal table."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PlanTable":
        """Builds a table from `to_json` output; raises `SparsityError` if it is not one."""
        try:
            rows: dict[str, Any] = {name: tuple(map(tuple, data[name])) for name in ("neurons", "recall")}
            rows |= {name: tuple(map(tuple, data.get(name, ()))) for name in ("budgets", "order")}
            rows |= {name: tuple(data[name]) for name in ("batch_sizes", "dense_layers") if name in data}
            rows |= {name: str(data[name]) for name in ("weights", "routers") if name in data}
            return cls(**{**data, **rows})
        except (KeyError, TypeError) as error:
            raise SparsityError(
                "not a plan table", where="plans", got=str(error), hint="run polarjax calibrate again"
            ) from error


def densities(plan: SparsityPlan, config: ModelConfig) -> dict[str, float]:
    """Fraction of the neurons and groups that `plan` keeps, averaged over all layers."""
    mean = lambda counts, full: float(np.mean([(count or full) / full for count in counts]))
    return {
        "neurons": mean(plan.neurons, config.d_ff),
        "groups": mean(plan.groups, config.num_kv_heads),
    }
