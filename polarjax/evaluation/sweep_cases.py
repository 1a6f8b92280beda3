"""What a sweep measures: its arguments, and the rows of the report that they ask for."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polarjax.checkpoint.bundle import Bundle
from polarjax.evaluation import sweep_checks as checks
from polarjax.evaluation.checks import check_scoring
from polarjax.evaluation.parting import GreedyOptions
from polarjax.model.layout import mesh_of
from polarjax.model.spread_checks import check_around, check_batch, check_spread
from polarjax.numeric import plain
from polarjax.selection.checks import check_sparsity
from polarjax.selection.plans import SparsityPlan, uniform_groups
from polarjax.selection.selectors import Selector, Sparsity, Static

type PlanOf = Callable[[float, int], SparsityPlan]
"""(density of the groups, sequences decoded together) -> plan."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One row to measure; `batch_size` is None if masked."""

    name: str
    selector: Selector
    density: float
    plan: SparsityPlan
    batch_size: int | None

    @property
    def sparsity(self) -> Sparsity:
        return Sparsity(self.selector, self.plan)

    @property
    def label(self) -> str:
        protocol = "masked" if self.batch_size is None else f"decode at batch {self.batch_size}"
        return f"{protocol}, {self.name} at {self.density:g}"


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """What the arguments of a sweep come to.

    Attributes:
      cases: the rows to measure.
      context: tokens at the start of each window that are not scored.
      settings: the arguments as the report repeats them.
      notes: what was left out, and why.
    """

    cases: Sequence[Case]
    context: int
    settings: Mapping[str, Any]
    notes: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """The arguments of `sweep`, with the same names."""

    densities: Sequence[float | None]
    selectors: Sequence[str] | Mapping[str, Selector]
    protocols: Sequence[str]
    batch_sizes: Sequence[int] | None
    context: int
    neurons: str
    dense_layers: Sequence[int] | None
    plan_of: PlanOf | None
    static: Static | None
    greedy: GreedyOptions | None
    seed: int
    source: Mapping[str, Any] | None

    def chosen(self, bundle: Bundle, shape: tuple[int, ...]) -> Chosen:
        """Checks everything for windows of this shape [n T], before anything is measured."""
        check_around(bundle.model)
        checks.check_given(self.plan_of, self.static, self.source)
        config = bundle.model.config
        protocols = checks.check_choices("protocols", self.protocols, checks.PROTOCOLS)
        found, notes = checks.find_selectors(bundle, self.selectors, self.static, self.seed)
        masked = found if "masked" in protocols else {}
        decoding, more = checks.can_decode(found, protocols)
        _, context = check_scoring(shape, "decode" if decoding else "masked", 1, self.context)
        densities = checks.check_densities(self.densities, bundle) if found else ()
        sizes = checks.check_batch_sizes(self.batch_sizes, shape[0]) if decoding else ()
        greedy = self.greedy if decoding else None
        checks.check_greedy(greedy, config, shape[1])
        (neurons,) = checks.check_choices("neurons", [self.neurons], checks.NEURONS)
        given, own = self.plan_of, functools.partial(_plan, bundle, neurons, self.dense_layers)
        plans = own if given is None else lambda density, size: given(density, size or 1)
        cases = _cases(masked, densities, plans, None)
        cases += [case for size in sizes for case in _cases(decoding, densities, plans, size)]
        for case in cases:
            check_sparsity(case.sparsity, config)
            if case.batch_size is not None:
                check_spread(bundle.model, case.sparsity)
                check_batch(bundle.model, case.sparsity, case.batch_size, where="batch_sizes")
        settings = {
            "densities": densities,
            "selectors": tuple(found),
            "protocols": protocols,
            "batch_sizes": sizes,
            "neurons": neurons,
            "greedy": greedy,
            "seed": plain(self.seed),
        }
        return Chosen(cases, context, settings, notes + more)


def _cases(
    selectors: Mapping[str, Selector],
    densities: Sequence[float],
    plans: Callable[[float, int | None], SparsityPlan],
    batch_size: int | None,
) -> list[Case]:
    """All densities and selectors at a batch size, or masked."""
    return [
        Case(name, selector, density, plan, batch_size)
        for density in (densities if selectors else ())
        for plan in [plans(density, batch_size)]
        for name, selector in selectors.items()
    ]


def _plan(
    bundle: Bundle, neurons: str, dense_layers: Sequence[int] | None, density: float, batch_size: int | None
) -> SparsityPlan:
    """The calibrated plan, with the choices that override it; `batch_size` is None if masked."""
    config, plans = bundle.model.config, bundle.plans
    if neurons == "plan" and config.neuron_sparsity:
        bundle.require("plans", where="sweep")
    layers = None if dense_layers is None else checks.check_dense_layers(dense_layers, config)
    if plans is None:
        groups = uniform_groups(config, density, dense_layers=(0,) if layers is None else layers)
        return SparsityPlan((None,) * config.num_layers, groups)
    bundle.require("plans", where="sweep")
    if layers is not None:
        plans = dataclasses.replace(plans, dense_layers=layers, budgets=())
    shards = 1 if batch_size is None else mesh_of(bundle.model).data
    plan = plans.for_batch(batch_size or 1, config, density, batch_shards=shards)
    return plan if neurons == "plan" else dataclasses.replace(plan, neurons=(None,) * config.num_layers)
