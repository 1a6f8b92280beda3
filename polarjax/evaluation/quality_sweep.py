"""A sweep: what every selector costs at every density, masked and decoding, in one run over the text."""

import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import jax
import numpy as np

from polarjax.checkpoint.bundle import Bundle
from polarjax.evaluation import sweep_checks as checks
from polarjax.evaluation.checks import scored_after
from polarjax.evaluation.estimates import Sums, Units, differences, perplexities, ratio
from polarjax.evaluation.paired import decoded_sums, masked_batch, masked_sums
from polarjax.evaluation.parting import GreedyOptions, greedy_texts, parting, prompts_of
from polarjax.evaluation.report import Report, Row
from polarjax.evaluation.scoring import first_scored
from polarjax.evaluation.sweep_cases import Asked, Case, PlanOf
from polarjax.evaluation.text_perplexity import perplexity
from polarjax.model.checks import check_windows, host_array
from polarjax.model.decoder import Decoder
from polarjax.model.parameters import fingerprint
from polarjax.progress import task
from polarjax.selection.plans import densities as kept_by
from polarjax.selection.selectors import Selector, Sparsity, Static
from polarjax.text.token_windows import ScoredWindows
from polarjax.types import Bool, Int


def sweep(
    model: Bundle | Decoder,
    windows: ScoredWindows | Int[np.ndarray, "n T"],
    *,
    densities: Sequence[float | None] = (None,),
    selectors: Sequence[str] | Mapping[str, Selector] = ("router",),
    protocols: Sequence[str] = checks.PROTOCOLS,
    batch_sizes: Sequence[int] | None = None,
    context: int = 1,
    neurons: Literal["plan", "dense"] = "plan",
    dense_layers: Sequence[int] | None = None,
    plan_of: PlanOf | None = None,
    static: Static | None = None,
    greedy: GreedyOptions | None = None,
    seed: int = 0,
    source: Mapping[str, Any] | None = None,
) -> Report:
    """Measures perplexity, KL(dense ‖ sparse), top-1 agreement and greedy texts of all combinations.

    Memory is bounded: a masked batch is as large as its logits allow, and only sums over each window are kept.
    Protocol "masked" compiles once for all densities and selectors; "decode" once a density, batch size and kind of
    selector, as generation does. Standard errors take windows as the units (`polarjax.evaluation.report.ERRORS`).

    Args:
      model: a bundle, or a decoder alone.
      windows: from `polarjax.text.token_windows.scored_windows`, or int32 [n T], for figures per token only.
      densities: fractions of the groups to keep; None is the calibrated one.
      selectors: "router", "oracle", "random", "static"; or selectors by name. Empty measures the dense model.
      protocols: "masked", "decode", or both; see `perplexity`. Oracle and random are only masked.
      batch_sizes: sequences decoded together, one row of the report for each; None is 8, or all windows
        if they are fewer.
      context: tokens at the start of each window that are read (dense in "decode") but not scored.
      neurons: "plan" keeps the calibrated neurons of batch 1 (masked) or the batch size; "dense" keeps all.
      dense_layers: layers that keep all groups; None is what was calibrated, or layer 0.
      plan_of: a plan for each density and batch size, in place of the calibrated ones.
      static: scores of the static selector, from `static_selector` and another text; without, it is left out.
      greedy: how many tokens to generate to see where greedy texts part, in "decode"; None generates none.
      seed: seed of the random selector.
      source: what the report repeats: "path" of the model, "texts", and anything else.

    Raises:
      InputError: an argument that is not one of these, too few windows, or a model that computes NaN.
      SparsityError: routers or plans are missing or for another model, or a density is not one.
    """
    given = dict(locals())
    bundle, text = checks.as_bundle(given.pop("model")), _Text.of(given.pop("windows"), model)
    return _measure(bundle, text, Asked(**given))


def _measure(bundle: Bundle, text: "_Text", asked: Asked) -> Report:
    started = time.perf_counter()
    chosen = asked.chosen(bundle, text.tokens.shape)
    context, source = chosen.context, dict(asked.source or {})
    scored, units = text.scored_after(context), text.units(context)
    job = _Job(bundle.model, text, context, scored, units, asked.greedy)
    dense, rows = job.run(chosen.cases)
    return Report(
        model={"path": source.pop("path", None), **_described(bundle)},
        text={**source, **job.described()},
        settings=chosen.settings,
        dense=dense,
        rows=rows,
        notes=chosen.notes,
        versions=_versions(),
        seconds=time.perf_counter() - started,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Text:
    """Checked windows, with what is known of the text that they come from."""

    tokens: Int[np.ndarray, "n T"]
    cut: ScoredWindows | None

    @classmethod
    def of(cls, windows: Any, model: Bundle | Decoder) -> "_Text":
        config = checks.as_bundle(model).model.config
        cut = windows if isinstance(windows, ScoredWindows) else None
        given = windows if cut is None else cut.tokens
        return cls(check_windows(host_array(given), config), cut)

    def scored_after(self, context: int) -> Bool[np.ndarray, "n after"]:
        return scored_after(None if self.cut is None else self.cut.scored, self.tokens.shape, context)

    def units(self, context: int) -> Units:
        count = lambda values: values[:, first_scored(context) :].sum(1, dtype=np.int64)
        tokens = self.scored_after(context).sum(1, dtype=np.int64)
        if self.cut is None:
            return Units(tokens)
        return Units(tokens, count(self.cut.num_bytes), count(self.cut.num_words))


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """The model, the text, and how it is scored."""

    model: Decoder
    text: _Text
    context: int
    scored: Bool[np.ndarray, "n after"]
    units: Units
    greedy: GreedyOptions | None

    def run(self, cases: Sequence[Case]) -> tuple[list[dict[str, Any]], list[Row]]:
        """The dense model by protocol and batch size, and a row for each case."""
        if not cases:
            return [self._dense_alone()], []
        masked = [case for case in cases if case.batch_size is None]
        decoding = [case for case in cases if case.batch_size is not None]
        with task("quality", len(self.text.tokens) * len(cases), "windows") as advance:
            measured = list(zip(masked, self._masked(masked, advance), strict=True))
            measured += [(case, self._decoded(case, advance)) for case in decoding]
        dense = {case.batch_size: sums.dense for case, sums in reversed(measured)}
        texts = functools.cache(self._texts)
        rows = [self._row(case, sums, texts) for case, sums in measured]
        return [
            self._dense(size, dense[size]) for size in dict.fromkeys(row.batch_size for row in rows)
        ], rows

    def _masked(self, cases: Sequence[Case], advance: Callable[..., None]) -> list[Sums]:
        selectors = {case.name: case.selector for case in cases}
        numbers = {name: number for number, name in enumerate(selectors)}
        return masked_sums(
            self.model,
            self.text.tokens,
            tuple(selectors.values()),
            [(numbers[case.name], case.plan) for case in cases],
            self.scored,
            context=self.context,
            names=[case.label for case in cases],
            advance=advance,
        )

    def _decoded(self, case: Case, advance: Callable[..., None]) -> Sums:
        return decoded_sums(
            self.model,
            self.text.tokens,
            case.sparsity,
            self.scored,
            batch_size=case.batch_size or 1,
            context=self.context,
            name=case.label,
            advance=advance,
        )

    def described(self) -> dict[str, Any]:
        """The windows, and how much of them is scored."""
        cut, (count, length) = self.text.cut, self.text.tokens.shape
        known = {} if cut is None else {"stride": cut.stride, "bos": cut.bos}
        totals = {f"scored_{name}": total for name, total in self.units.totals().items()}
        return {"windows": count, "window": length, **known, "context": self.context, **totals}

    def _texts(self, batch_size: int, sparsity: Sparsity | None) -> Int[np.ndarray, "m new"]:
        options = self.greedy or GreedyOptions()
        prompts = prompts_of(self.text.tokens, options, batch_size)
        return greedy_texts(
            self.model, prompts, sparsity, batch_size=batch_size, new_tokens=options.new_tokens
        )

    def _dense(self, batch_size: int | None, nll: np.ndarray) -> dict[str, Any]:
        protocol = "masked" if batch_size is None else "decode"
        return {"protocol": protocol, "batch_size": batch_size, **perplexities(nll, self.units)}

    def _dense_alone(self) -> dict[str, Any]:
        size = masked_batch(self.text.tokens.shape, self.model.config.vocab_size)
        scored = None if self.text.cut is None else self.text.cut.scored
        options: dict[str, Any] = {"batch_size": size, "context": self.context, "scored": scored}
        measured = perplexity(self.model, self.text.tokens, **options, description="dense")
        return self._dense(None, np.nansum(measured.token_nll, 1, dtype=np.float64))

    def _row(self, case: Case, sums: Sums, texts: Callable[..., Int[np.ndarray, "m new"]]) -> Row:
        size, greedy = case.batch_size, None
        if size is not None and self.greedy is not None:
            greedy = parting(texts(size, None), self._texts(size, case.sparsity))
        return Row(
            selector=case.name,
            density=case.density,
            protocol="masked" if size is None else "decode",
            batch_size=size,
            plan=case.plan,
            kept=kept_by(case.plan, self.model.config),
            sparse=perplexities(sums.sparse, self.units),
            against_dense=differences(sums, self.units),
            kl=ratio(sums.kl, self.units.tokens),
            top1=ratio(sums.same, self.units.tokens),
            greedy=greedy,
        )


def _described(bundle: Bundle) -> dict[str, Any]:
    config = bundle.model.config
    return {
        "weights": fingerprint(bundle.model),
        "routers": None if bundle.routers is None else bundle.routers.fingerprint,
        "family": bundle.model_type,
        "layers": config.num_layers,
        "groups": config.num_kv_heads,
        "neurons": config.d_ff,
        "dtype": str(bundle.model.dtype),
    }


def _versions() -> dict[str, str]:
    names = ("polarjax", "jax", "jaxlib", "flax", "numpy", "transformers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": jax.devices()[0].device_kind,
    }
