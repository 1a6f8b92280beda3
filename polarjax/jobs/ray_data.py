"""Prompts over many machines: a class for Ray Data's `map_batches`. Ray shares out the batches and repeats lost ones.

Needs the package ray: `pip install 'polarjax[ray]'`.
"""

import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax

from polarjax.checkpoint.bundle import needed_tokenizer
from polarjax.checkpoint.loading import load
from polarjax.engine.checks import check_dense, check_stop_count
from polarjax.engine.engine import Engine
from polarjax.engine.in_order import InOrder
from polarjax.engine.slots import MOST_LOGPROBS
from polarjax.errors import InputError
from polarjax.generation.checks import check_best, check_copies, check_new_tokens, check_seed
from polarjax.generation.sampling import Categorical
from polarjax.jobs.line_requests import LineRequests, tasks_apart
from polarjax.jobs.line_settings import check_value, with_options, with_stops
from polarjax.jobs.tables import as_table, check_columns, lines_of, with_answers
from polarjax.model.mesh_shape import Attention
from polarjax.sharding import described_mesh
from polarjax.text.prompts import most_characters
from polarjax.types import DTypeLike


class CompletePrompts:
    """Completes the prompts of a Ray data set: `dataset.map_batches(CompletePrompts, fn_constructor_args=("model",),
    batch_format="pyarrow", num_gpus=1, compute=ray.data.ActorPoolStrategy(size=2))`.

    Each actor loads the model once, onto the GPUs that Ray gives it, and answers its batches on an engine. A row holds a
    `prompt` (a text or token ids) or the `messages` of a chat, and may have settings of its own, as a line of
    `polarjax generate --prompts` may; null is the same as no setting. The result repeats the rows, each with
    `completions`, a list of structs with `text`, `tokens` and `ending`, or an `error`.

    A batch that was lost with its actor is answered again as before, up to rounding: what is drawn for a row depends on
    the seed and the row's prompt, settings and `id`, not on its batch, its actor or when it came; rows that are the same
    in all of them draw the same.

    Args:
      folder: the model directory, on every machine.
      slots, capacity, dense, head_density: see `Engine`.
      dtype: the parameters' dtype; None keeps the stored one.
      mesh: how the actor's GPUs share the model, such as "data=1,model=4" with num_gpus=4; None uses the first.
      attention: with a mesh, see `shard`.
      max_new_tokens: most new tokens; None is the model's, or 64, limited by the positions left.
      temperature, top_k, top_p, repetition_penalty, greedy: as in `GenerationSettings.with_flags`; they override the
        model's generation_config.json, and a row's own settings override them.
      stop, stop_ids: strings and ids that end a completion, instead of the model's.
      num_return_sequences: completions of each prompt.
      logprobs: n; completions then have the log-probabilities of their tokens and of the n likeliest ones.
      seed: of the draws.
      chat, system: treat each `prompt` as a user message, after this system message.

    Raises:
      CheckpointError: the directory is missing or damaged, or has no tokenizer.
      InputError: an option is out of range, or Ray gave the actor none of the GPUs.
      SparsityError: the density isn't one, or there are no routers or plans for it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        slots: int | None = None,
        capacity: int | None = None,
        dense: bool = False,
        head_density: float | None = None,
        dtype: DTypeLike | None = None,
        mesh: str | None = None,
        attention: Attention | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        greedy: bool = False,
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] | None = None,
        num_return_sequences: int = 1,
        logprobs: int | None = None,
        seed: int = 0,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        _check_device()
        check_dense(dense, head_density)
        drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        drawing["repetition_penalty"] = repetition_penalty
        for name, value in drawing.items():
            check_value(
                name, value, where=f"CompletePrompts: {name}", hint="correct the value or leave it out"
            )
        shared = {} if mesh is None else described_mesh(mesh, where="CompletePrompts: mesh")
        bundle = load(folder, dtype=dtype, attention=attention, **shared)
        tokenizer = needed_tokenizer(bundle, folder)
        for note in bundle.generation.notes:
            print(note, file=sys.stderr)
        settings = with_stops(with_options(bundle.generation, greedy=greedy, **drawing), stop, stop_ids)
        check_stop_count(
            len(settings.stop_ids), where="CompletePrompts: stop_ids", hint="pass the others as stop"
        )
        dense = dense or (head_density is None and bundle.missing is not None)
        self._plans, self._lock = None if dense else bundle.plans, threading.Lock()
        self._engine = Engine(bundle, slots=slots, capacity=capacity, head_density=head_density, dense=dense)
        self._requests = LineRequests(
            tokenizer=tokenizer,
            settings=settings,
            max_new_tokens=None if max_new_tokens is None else check_new_tokens(max_new_tokens),
            copies=check_copies(num_return_sequences, Categorical()),
            seed=check_seed(seed),
            logprobs=check_best(logprobs, min(MOST_LOGPROBS, bundle.model.config.vocab_size)),
            chat=chat,
            system=system,
            most_characters=most_characters(tokenizer, self._engine.capacity),
        )

    def __call__(self, batch: Any) -> Any:
        """The batch, an Arrow table, a dict of columns or a DataFrame, as an Arrow table with the answers.

        Raises:
          InputError: there is no column of prompts, or several greedy completions of each were asked for.
        """
        table = as_table(batch)
        columns = set(table.column_names)
        check_columns(table.column_names)
        drawn = bool(columns & {"temperature", "top_k", "top_p"})  # rows may ask for it
        check_copies(self._requests.copies, Categorical() if drawn else self._requests.settings.sampler)
        logprobs = "logprobs" in columns or self._requests.logprobs is not None
        with self._lock:  # one batch at a time: its rows alone decide how they are answered
            outcomes = self._outcomes(table, logprobs=logprobs)
        return with_answers(table, outcomes, logprobs=logprobs)

    def _outcomes(self, table: Any, *, logprobs: bool) -> list[dict[str, Any]]:
        tasks = (self._requests.task(number, line) for number, line in lines_of(table))
        apart = tasks_apart(self._engine, self._plans, logprobs=logprobs)
        runner = InOrder(self._engine, lambda _: next(tasks, None), lambda _: None, apart)
        return [self._requests.outcome(each) for each in runner]


def _check_device() -> None:
    """Raises `InputError` if this is an actor without a GPU on a machine that has some: JAX would use the CPU."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or jax.default_backend() != "cpu":
        return
    if "cpu" in (jax.config.jax_platforms or "").split(","):  # asked for
        return
    if here := _gpus_here(ray):
        raise InputError(
            "the actor has no GPU, so that JAX would use the CPU",
            where="CompletePrompts",
            got=f"num_gpus=0 on a machine with {here:g}",
            hint="pass num_gpus=1 to map_batches, or set JAX_PLATFORMS=cpu for the CPU",
        )


def _gpus_here(ray: Any) -> float:
    """The GPUs of the machine that this actor is on."""
    here = ray.get_runtime_context().get_node_id()
    return next((each["Resources"].get("GPU", 0) for each in ray.nodes() if each["NodeID"] == here), 0)
