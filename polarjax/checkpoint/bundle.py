"""A model directory: config, parameters, tokenizer, routers, plans and the manifest that holds them together.

config.json     ModelConfig and the format version
params/         orbax checkpoint of the parameters, one array for each dotted path
tokenizer/      the HuggingFace files, including generation_config.json
routers/        manifest.json and arrays/, an orbax checkpoint, once routers are trained
plans.json      the PlanTable, once calibrated
hf_config.json  config.json of the HuggingFace source
manifest.json   format version, dtype, source, shapes and checksums of params/
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from polarjax.checkpoint.belonging import (
    KEEP_OR_DROP,
    ONE_TRAINING,
    check_parts,
    check_routers_of_plans,
    check_weights,
)
from polarjax.checkpoint.learned import (
    PLANS,
    ROUTERS,
    kept_for,
    store_routers,
)
from polarjax.checkpoint.manifest import (
    SOURCE_CONFIG,
)
from polarjax.checkpoint.writer import new_model
from polarjax.errors import CheckpointError, InputError, SparsityError
from polarjax.generation.checks import random_key
from polarjax.generation.sampling import Sampler
from polarjax.generation.settings import GenerationSettings
from polarjax.model.checks import check_model
from polarjax.model.decoder import Decoder
from polarjax.model.layout import mesh_of
from polarjax.model.parameters import fingerprint, parameters
from polarjax.numeric import check_flags, check_type
from polarjax.selection.plans import PlanTable
from polarjax.selection.routers import Routers
from polarjax.selection.selectors import Sparsity
from polarjax.storage.atomic import absolute, write_json
from polarjax.text.assembly import Completion
from polarjax.text.continuation import ContinueOptions, Skip, continue_all, count_new_tokens
from polarjax.text.prompts import Message, as_prompts
from polarjax.text.tokenizer import Tokenizer
from polarjax.types import Array, Key


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The contents of a model directory.

    Attributes:
      model: the decoder with its parameters.
      tokenizer: None if the source had none.
      routers, plans: None until trained and calibrated.
      model_type: the HuggingFace family that the model was converted from, if any.
      source_config: config.json of the HuggingFace source, if any.
      weights: fingerprint of the model that the routers and plans were made for; computed if not given.
    """

    model: Decoder
    tokenizer: Tokenizer | None = None
    routers: Routers | None = None
    plans: PlanTable | None = None
    model_type: str | None = None
    source_config: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    weights: str = dataclasses.field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        check_parts(self.model, self.tokenizer, self.routers, self.plans)
        if self.routers is None and self.plans is None:
            object.__setattr__(self, "weights", "")
        elif not self.weights:
            object.__setattr__(self, "weights", fingerprint(self.model))

    def with_model(self, model: Decoder, *, keep_sparsity: bool = False) -> "Bundle":
        """The bundle with another model, for example a fine-tuned one.

        Args:
          model: of the same shape, if routers or plans are kept.
          keep_sparsity: keep routers and plans and mark them as made for `model`; otherwise drop them.

        Raises:
          SparsityError: routers or plans are kept and don't fit the model's shape.
        """
        if not keep_sparsity:
            return dataclasses.replace(self, model=model, routers=None, plans=None)
        weights = fingerprint(model)
        kept = kept_for(model.config, weights, self.routers, self.plans)
        return dataclasses.replace(self, model=model, weights=weights, routers=kept[0], plans=kept[1])

    @property
    def generation(self) -> GenerationSettings:
        """The model's own stop ids, stop strings and sampling defaults; empty without a tokenizer."""
        return GenerationSettings() if self.tokenizer is None else self.tokenizer.generation

    def complete(
        self,
        prompts: str | Iterable[str | Message | Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        stop_strings: Sequence[str] | None = None,
        stop_ids: Sequence[int] | None = None,
        repetition_penalty: float | None = None,
        sparsity: Sparsity | Literal["auto"] | None = "auto",
        batch_size: int | None = None,
        key: Key[Array, ""] | int = 0,
    ) -> list[Completion]:
        """Completes prompts, as `polarjax generate` does.

        Defaults come from the model's generation_config.json (`generation`).

        Args:
          prompts: texts, or conversations for the chat template: lists of messages such as
            `{"role": "user", "content": "Hi"}`. A single text or conversation works too.
          max_new_tokens: most tokens per completion; None is the model's, or 64, limited by the positions left.
          sampler: `Greedy()`, `Categorical(...)`, or any `Sampler`; None is the model's.
          stop_strings: strings that end a completion and are cut off; None uses the model's, () none.
          stop_ids: ids that end a completion, 0 to 2**31 - 1; None uses the model's, () none.
          repetition_penalty: above 1, makes ids already in the text less likely; None uses the model's, 1 disables it.
          sparsity: "auto" uses the routers and each batch's plan, if the bundle has both; None is the dense model; a
            `Sparsity` (see `Bundle.sparsity`) is used for every batch.
          batch_size: prompts per batch; None runs all at once.
          key: random key or seed for samplers that draw. The same key gives the same texts.

        Returns:
          one `Completion` for each prompt, in the order of the prompts; its `ending` is "failed" where the model
          computed NaN or infinity.

        Raises:
          CheckpointError: the bundle has no tokenizer.
          InputError: a prompt isn't a text or conversation, has no tokens or doesn't fit, or an option is out of range.
          SparsityError: `sparsity` is for another model.
        """
        tokenizer = needed_tokenizer(self, "Bundle.complete")
        asked = as_prompts(prompts)
        skip = self.sparsity_by_batch(sparsity)
        rows = [each.ids(tokenizer) for each in asked]
        options = ContinueOptions.of(
            self.generation,
            max_new_tokens=count_new_tokens(max_new_tokens, asked, rows, self.model, self.generation),
            sampler=sampler,
            stop_strings=stop_strings,
            stop_ids=stop_ids,
            repetition_penalty=repetition_penalty,
            batch_size=batch_size,
        )
        return continue_all(self.model, tokenizer, rows, random_key(key), options, skip=skip)

    @property
    def missing(self) -> Literal["routers", "plans"] | None:
        """The first part that sparse decoding still needs; None if both are there."""
        return "routers" if self.routers is None else "plans" if self.plans is None else None

    def sparsity_by_batch(
        self, sparsity: Sparsity | Literal["auto"] | None = "auto", head_density: float | None = None
    ) -> Skip:
        """What to skip, as a function of the number of sequences in a batch.

        Args:
          sparsity: "auto" uses the routers and each batch's plan, if the bundle has both; None is the dense model; a
            `Sparsity` is used for every batch.
          head_density: fraction of groups to keep, only with "auto"; then routers and plans are needed.

        Raises:
          InputError: `sparsity` is something else, or contradicts `head_density`.
          SparsityError: routers or plans are needed and missing.
        """
        if isinstance(sparsity, str) and sparsity == "auto":
            if self.missing and head_density is None:
                return lambda _: None
            self.sparsity(1, head_density)  # fails here instead of at the first batch
            return lambda batch_size: self.sparsity(batch_size, head_density)
        if (sparsity is None or isinstance(sparsity, Sparsity)) and head_density is not None:
            raise InputError(
                "a head density needs the bundle's own plans",
                where="head_density",
                got=f"{head_density} with {'the dense model' if sparsity is None else 'a Sparsity'}",
                hint='pass sparsity="auto", or leave the head density out',
            )
        if sparsity is None or isinstance(sparsity, Sparsity):
            return lambda _: sparsity
        raise InputError(
            "not a sparsity",
            where="sparsity",
            got=type(sparsity).__name__ if not isinstance(sparsity, str) else repr(sparsity),
            expected='"auto", None for the dense model, or a Sparsity',
            hint="pass bundle.sparsity(batch_size, head_density)",
        )

    def sparsity(self, batch_size: int, head_density: float | None = None) -> Sparsity:
        """What to skip when decoding `batch_size` sequences.

        Args:
          batch_size: B; neurons follow the plan of the next larger calibrated batch.
          head_density: fraction of groups to keep, above 0 and at most 1; None uses the calibrated default.

        Raises:
          SparsityError: routers or plans are missing or not for this model's weights, or the density is invalid.
        """
        self.require("routers", "plans", where="Bundle.sparsity")
        plan = self.plans.for_batch(  # pyrefly: ignore[missing-attribute]
            batch_size, self.model.config, head_density, batch_shards=mesh_of(self.model).data
        )
        return Sparsity(self.routers, plan)  # pyrefly: ignore[bad-argument-type]

    def require(self, *names: Literal["routers", "plans"], where: str) -> None:
        """Raises `SparsityError` if one of these parts is missing, or a part is for other weights; `where` asks."""
        sparsify = "run polarjax sparsify MODEL --text FILE first"
        hints = {
            "routers": sparsify,
            "plans": f"run polarjax calibrate MODEL --activations FOLDER, or {sparsify}",
        }
        for name in names:
            if getattr(self, name) is None:
                raise SparsityError(f"the model has no {name} yet", where=where, hint=hints[name])
        self._check_sparsity(where)

    def _check_sparsity(self, where: str) -> None:
        """Raises `SparsityError` unless the routers and plans belong to the model and to each other."""
        weights, routers = self._fingerprints
        for part in (self.routers, self.plans):
            if part is not None:
                part.check(self.model.config)
                check_weights(part, weights, made_for=self.weights, where=where, hint=KEEP_OR_DROP)
        if self.plans is not None and self.routers is not None:
            check_routers_of_plans(self.plans, routers, where=where, hint=ONE_TRAINING)

    @functools.cached_property
    def _fingerprints(self) -> tuple[str, str]:
        """Fingerprints of the model and the routers; "" if absent, or without routers and plans. Computed once."""
        if self.routers is None and self.plans is None:
            return "", ""
        return fingerprint(self.model), "" if self.routers is None else self.routers.fingerprint


def save(path: str | os.PathLike[str], bundle: Bundle, *, overwrite: bool = False) -> None:
    """Writes a model directory; parameters keep their dtypes.

    Raises:
      CheckpointError: `path` exists and `overwrite` is False, or the disk refuses.
      InputError: this is one of several processes of `jax.distributed`.
      SparsityError: routers or plans are for another model or other weights.
    """
    check_type(bundle, Bundle, where="save", hint="pass pj.save(path, pj.Bundle(model))")
    if (count := jax.process_count()) > 1:
        hint = "save it in a program that is one process"
        raise InputError("only a process that runs alone can save", where="save", got=count, hint=hint)
    check_model(bundle.model, where="save")
    check_flags("save", overwrite=overwrite)
    path, model = absolute(path), bundle.model
    bundle._check_sparsity("Bundle")
    with new_model(path, model.config, model_type=bundle.model_type, overwrite=overwrite) as writer:
        for name, value in parameters(model).items():
            writer.reserve(value.nbytes)
            writer.add(name, np.asarray(value))
        if bundle.source_config is not None:
            write_json(writer.folder / SOURCE_CONFIG, dict(bundle.source_config))
        if bundle.tokenizer is not None:
            shutil.copytree(bundle.tokenizer.folder, writer.tokenizer_folder, dirs_exist_ok=True)
        if bundle.routers is not None:
            store_routers(writer.folder / ROUTERS, bundle.routers)
        if bundle.plans is not None:
            write_json(writer.folder / PLANS, bundle.plans.to_json())


def needed_tokenizer(bundle: Bundle, where: object) -> Tokenizer:
    """The bundle's tokenizer; raises `CheckpointError` if it has none."""
    if bundle.tokenizer is None:
        raise CheckpointError(
            "the model directory has no tokenizer, which text needs",
            where=where,
            hint="copy the HuggingFace tokenizer files into its tokenizer/ folder",
        )
    return bundle.tokenizer
