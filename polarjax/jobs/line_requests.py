"""Lines of a prompt file as requests to an engine, and their results as lines of output."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from polarjax.engine.checks import check_stop_count
from polarjax.engine.engine import Engine
from polarjax.engine.in_order import Answer, Task, most_held
from polarjax.errors import InputError, PolarjaxError, not_finite
from polarjax.generation.checks import check_copies, check_seed
from polarjax.generation.settings import GenerationSettings
from polarjax.jobs.line_settings import with_line, with_stops
from polarjax.selection.plans import PlanTable
from polarjax.text.assembly import Ending
from polarjax.text.prompt_files import PromptLine
from polarjax.text.prompts import Prompt, as_json, characters
from polarjax.text.tokenizer import Tokenizer

_DRAWING = ("temperature", "top_k", "top_p", "repetition_penalty")
_CODE = ("Engine.submit", "Tokenizer.encode", "Tokenizer.encode_chat", "stop_strings")


@dataclasses.dataclass(frozen=True)
class LineRequests:
    """How lines are answered where they don't say it themselves.

    Attributes:
      tokenizer: the model's.
      settings: sampling and stops.
      max_new_tokens: most new tokens; None leaves it to the engine.
      copies: requests for each line.
      seed: of the first line; those of other lines follow from it and the line's index.
      logprobs: n, or None.
      chat, system: as in `Prompt.ids`.
      most_characters: a text that is longer isn't tokenized, because it can't fit.
    """

    tokenizer: Tokenizer
    settings: GenerationSettings
    max_new_tokens: int | None
    copies: int
    seed: int
    logprobs: int | None
    chat: bool
    system: str | None
    most_characters: int

    def task(self, index: int, line: PromptLine) -> Task:
        """The requests of the line with this index, or what is wrong with it."""
        if line.prompt is None:
            return Task(line, error=line.error, size=line.size)
        try:
            self._check_size(line.prompt)
            given = line.settings
            settings = self._settings(given)
            check_copies(self.copies, settings.sampler)
            check_stop_count(len(settings.stop_ids), hint="give the others as stop")
            own = check_seed(given["seed"]) if "seed" in given else None
            ids = line.prompt.ids(self.tokenizer, chat=self.chat, system=self.system)
        except InputError as error:
            return Task(line, error=error, size=line.size)
        options = {
            "prompt": ids,
            "max_new_tokens": given.get("max_new_tokens", self.max_new_tokens),
            "sampler": settings.sampler,
            "stop_ids": settings.stop_ids,
            "stop_strings": settings.stop_strings,
            "repetition_penalty": settings.repetition_penalty,
            "logprobs": given.get("logprobs", self.logprobs),
        }
        return Task(line, options, self._seeds(index, own), size=line.size)

    def _check_size(self, prompt: Prompt) -> None:
        if (got := characters(prompt.text) + characters(prompt.messages or ())) > self.most_characters:
            expected = f"at most {self.most_characters:,}, even of the longest tokens"
            hint = "shorten the prompt, or give a larger --capacity"
            raise InputError(
                "the prompt is too long", got=f"{got:,} characters", expected=expected, hint=hint
            )

    def _settings(self, given: Mapping[str, Any]) -> GenerationSettings:
        """The settings of a line."""
        drawing = {name: given[name] for name in _DRAWING if name in given}
        return with_stops(with_line(self.settings, drawing), given.get("stop"), given.get("stop_ids"))

    def _seeds(self, index: int, own: int | None) -> Iterator[int]:
        """A seed for each copy: the line's or the command's own, then ones that follow from it."""
        index, seed = (index, self.seed) if own is None else (0, own)
        for copy in range(self.copies):
            yield seed if not index and not copy else _mixed(seed, index, copy)

    def record(self, task: Task) -> str:
        """The line of output."""
        return as_json({**task.source.head, **self.outcome(task)})

    def outcome(self, task: Task) -> dict[str, Any]:
        """What the output adds to a line, by name: see `ANSWERS`."""
        made: dict[str, Any] = {}
        if task.error is None:
            made["completions"] = [self._completion(task, each) for each in task.answers]
        if (error := error_of(task)) is not None:
            made["error"] = str(error)
        return made

    def _completion(self, task: Task, answer: Answer) -> dict[str, Any]:
        made = {
            "text": answer.text,
            "tokens": len(answer.tokens),
            "ending": self.ending(task, answer),
        }
        if task.options["logprobs"] is None:
            return made
        names = ("chosen", "ids", "best")
        parts = {name: [np.asarray(getattr(each, name)) for each in answer.logprobs] for name in names}
        lists = {name: [each for part in parts[name] for each in part.tolist()] for name in names}
        chosen, best = lists["chosen"], lists["best"]
        lists |= {"chosen": [_rounded(each) for each in chosen]}
        lists |= {"best": [[_rounded(each) for each in row] for row in best]}
        return made | {"logprobs": {"tokens": answer.tokens.tolist(), **lists}}

    def ending(self, task: Task, answer: Answer) -> Ending:
        """Why an answer ended, in the words of `Completion`."""
        if answer.finished == "failed":
            return "failed"
        if answer.finished != "stop":
            return "length"
        special = map(self.tokenizer.special_id, task.options["stop_strings"])
        last = answer.tokens[-1] if answer.tokens else None
        return "stop_id" if last in (*task.options["stop_ids"], *special) else "stop_string"


def tasks_apart(engine: Engine, plans: PlanTable | None, *, logprobs: bool) -> int | None:
    """How many lines run together without mixing with others (see `InOrder`); None if nothing depends on the company.

    Args:
      engine: what runs them.
      plans: of sparse decoding; one that selects neurons does so for all rows together.
      logprobs: whether there are log-probabilities, whose last digits are rounding.
    """
    return most_held(engine.slots) if logprobs or (plans and plans.selects_neurons) else None


def begins(line: PromptLine, written: Mapping[str, Any]) -> bool:
    """Whether a line of output is of this line of the prompts."""
    return all(written.get(key, _NOTHING) == value for key, value in line.head.items())


_NOTHING = object()


def error_of(task: Task) -> InputError | None:
    """What is wrong with a line, or with its answers."""
    name = task.source.name
    if task.error is not None:
        return _located(name, task.error)
    failed = [len(each.tokens) for each in task.answers if each.finished == "failed"]
    if not failed:
        return None
    return not_finite(name, f"{len(failed)} of {len(task.answers)} sequences, one after {failed[0]} tokens")


def _located(name: str, error: PolarjaxError) -> InputError:
    """The error with the line in front of the key that it is about."""
    parts = [part for part in str(error.where or "").split(": ") if part and part not in (name, *_CODE)]
    where = ": ".join([name, *parts])
    return InputError(error.what, where=where, got=error.got, expected=error.expected, hint=error.hint)


def _mixed(seed: int, index: int, copy: int) -> int:
    digest = hashlib.sha256(f"{seed} {index} {copy}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _rounded(value: float) -> float | None:
    """A log-probability in JSON."""
    return round(value, 6) if math.isfinite(value) else None
