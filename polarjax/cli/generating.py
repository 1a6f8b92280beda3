"""The work of `polarjax generate --prompt`: prepare the model, run, write and print."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from polarjax.checkpoint.bundle import Bundle
from polarjax.checkpoint.loading import load_with_tokenizer
from polarjax.cli.generate_options import GenerateOptions
from polarjax.cli.inputs import check_dense, placement, random_key
from polarjax.cli.job_output import standard_output
from polarjax.cli.sampling_options import check_options, with_stop_options
from polarjax.errors import InputError, not_finite
from polarjax.generation.checks import check_copies
from polarjax.generation.settings import GenerationSettings
from polarjax.jobs.line_settings import with_options
from polarjax.selection.plans import densities
from polarjax.selection.selectors import Sparsity
from polarjax.storage.atomic import atomic_file
from polarjax.text.assembly import Completion
from polarjax.text.byte_lines import STDIN
from polarjax.text.continuation import (
    ContinueOptions,
    Row,
    Show,
    check_batch_size,
    continue_all,
    count_new_tokens,
)
from polarjax.text.prompts import Prompt
from polarjax.text.tokenizer import Tokenizer
from polarjax.types import Array, Key

_LACKS = {
    "routers": "The model has no routers yet, so this is dense; polarjax sparsify learns them.",
    "plans": "The model has no plans yet, so this is dense; polarjax calibrate makes them.",
}


def run(options: GenerateOptions) -> dict[str, Any]:
    """Continues the prompts; prints the texts, writes `--output` completely or not at all, returns the numbers."""
    check(options)
    _check_alone(options)
    if options.output != STDIN:
        return _run(options, _lines_of_file(options))
    with standard_output() as stream, contextlib.redirect_stdout(sys.stderr):
        return _run(options, contextlib.nullcontext(stream.write))


def _run(
    options: GenerateOptions, output: contextlib.AbstractContextManager[Callable[[str], None] | None]
) -> dict[str, Any]:
    key = random_key(options.seed)
    given = [Prompt.of(text, f"prompt {i}") for i, text in enumerate(options.prompt or [], 1)]
    with output as write:
        job = prepare(options, given, key)
        if options.timed:
            job.run()
        started = time.perf_counter()
        made = job.run(_show(given[0], options.chat) if options.stream else None)
        seconds = time.perf_counter() - started
        _check_finite(made, options.folder)
        if write is not None:
            for i in range(len(given)):
                write(job.completed(i, made))
    result = _result(job, made, seconds, timed=options.timed)
    if not options.stream and options.output is None:
        print_texts(given, options.chat, result["texts"])
    _print_summary(result, options.output)
    return result


@contextlib.contextmanager
def _lines_of_file(options: GenerateOptions) -> Iterator[Callable[[str], None] | None]:
    """Yields a function that writes a line of `--output`, or None if there is no such file."""
    if options.output is None:
        yield None
        return
    with atomic_file(options.output, overwrite=options.overwrite) as file:
        yield lambda line: file.writelines((line, "\n"))


def check(options: GenerateOptions) -> None:
    """Raises `InputError` for options that contradict each other, or values that no model accepts."""
    check_dense(options.dense, options.head_density)
    if options.system is not None and not options.chat:
        raise InputError("--system is part of a chat", hint="give --chat too, or leave it out")
    check_batch_size(options.slots, where="--slots")
    check_options(**options.drawing)


def _check_alone(options: GenerateOptions) -> None:
    """Raises `InputError` unless there are prompts, and options for them."""
    for_files = {"--resume": options.resume, "--capacity": options.capacity, "--logprobs": options.logprobs}
    for name, value in for_files.items():
        if value is not None and value is not False:
            raise InputError(f"{name} is for --prompts", hint="give --prompts FILE, or leave it out")
    if not options.prompt:
        raise InputError("no prompt", hint="give --prompt TEXT or --prompts FILE")
    check_stream(options, several=len(options.prompt) > 1)


def check_stream(options: GenerateOptions, *, several: bool) -> None:
    """Raises `InputError` if more is to be streamed than one sequence."""
    several = several or options.num_return_sequences > 1
    if options.stream and (several or options.output is not None or options.timed):
        raise InputError(
            "--stream shows one sequence", hint="give one --prompt, without --output and --timed"
        )


def prepare(options: GenerateOptions, given: Sequence[Prompt], key: Key[Array, ""]) -> "Job":
    """Loads the model and tokenizes the prompts; prints which settings are ignored and why decoding is dense."""
    bundle, tokenizer = load_with_tokenizer(
        options.folder, options.dtype, **placement(options.mesh, options.attention)
    )
    settings = merged_settings(bundle.generation, options)
    check_copies(options.num_return_sequences, settings.sampler)
    dense = runs_dense(bundle, options)
    rows = [each.ids(tokenizer, chat=options.chat, system=options.system) for each in given]
    count = count_new_tokens(
        options.max_new_tokens, given, rows, bundle.model, settings, option="--max-new-tokens"
    )
    how = ContinueOptions.of(
        settings,
        max_new_tokens=count,
        copies=options.num_return_sequences,
        batch_size=min(options.slots or len(rows), len(rows)),
    )
    return Job(bundle, tokenizer, given, rows, key, how, dense, options.head_density)


def merged_settings(asked: GenerationSettings, options: GenerateOptions) -> GenerationSettings:
    """The model's settings, overridden by options; prints which are ignored."""
    settings = with_options(asked, greedy=options.greedy, **options.drawing)
    settings = with_stop_options(settings, options.stop, options.stop_id)
    for note in settings.notes:
        print(note, file=sys.stderr)
    return settings


def runs_dense(bundle: Bundle, options: GenerateOptions) -> bool:
    """Whether nothing is skipped; prints why, unless that was asked for."""
    dense = options.dense or (options.head_density is None and bundle.missing is not None)
    if dense and not options.dense:
        print(_LACKS[str(bundle.missing)])
    return dense


@dataclasses.dataclass(frozen=True)
class Job:
    """All prompts, and how to continue them.

    Attributes:
      bundle: the model directory.
      tokenizer: its tokenizer.
      given: the prompts.
      rows: their token ids.
      key: random key.
      how: sampler, limits and sizes.
      dense: whether to skip nothing.
      head_density: fraction of groups to keep; None takes the calibrated default.
    """

    bundle: Bundle
    tokenizer: Tokenizer
    given: Sequence[Prompt]
    rows: Sequence[Row]
    key: Key[Array, ""]
    how: ContinueOptions
    dense: bool
    head_density: float | None

    def run(self, show: Show | None = None) -> list[Completion]:
        """The completions of all prompts in their order, `copies` for each."""
        return continue_all(
            self.bundle.model, self.tokenizer, self.rows, self.key, self.how, skip=self.skip, show=show
        )

    def skip(self, batch_size: int) -> Sparsity | None:
        """The sparsity of a batch of `batch_size` sequences."""
        return None if self.dense else self.bundle.sparsity(batch_size, self.head_density)

    @property
    def density(self) -> dict[str, float] | None:
        """Densities of the first batch; None if dense."""
        sparsity = self.skip((self.how.batch_size or len(self.rows)) * self.how.copies)
        return None if sparsity is None else densities(sparsity.plan, self.bundle.model.config)

    def completed(self, i: int, made: Sequence[Completion]) -> str:
        """Prompt `i` with its completions as a line of JSON."""
        copies = self.how.copies
        return self.given[i].completed(made[i * copies : (i + 1) * copies])


def print_prompt(prompt: Prompt, chat: bool) -> None:
    """Prints the prompt if the text that is streamed continues it."""
    if not chat and prompt.messages is None:
        print(prompt.text, end="", flush=True)


def _show(prompt: Prompt, chat: bool) -> Show:
    """Prints new text at once."""
    print_prompt(prompt, chat)
    return lambda pieces: print(pieces[0], end="", flush=True)


def _check_finite(made: Sequence[Completion], folder: Path) -> None:
    failed = [i for i, each in enumerate(made) if each.ending == "failed"]
    if failed:
        first = f"sequence {failed[0] + 1} after {len(made[failed[0]].tokens)} tokens"
        raise not_finite(folder, f"{len(failed)} of {len(made)} sequences, {first}")


def _result(job: Job, made: Sequence[Completion], seconds: float, *, timed: bool) -> dict[str, Any]:
    counts = [len(each.tokens) for each in made]
    return {
        "prompts": [each.text or each.name for each in job.given for _ in range(job.how.copies)],
        "texts": [each.text for each in made],
        "tokens": counts,
        "stopped": [each.ending != "length" for each in made],
        "endings": [each.ending for each in made],
        "seconds": seconds,
        "tokens_per_second": sum(counts) / seconds,
        "compilation_included": not timed,
        "density": job.density,
    }


def print_texts(given: Sequence[Prompt], chat: bool, texts: Sequence[str]) -> None:
    """Prints the texts of each prompt after it."""
    copies = len(texts) // len(given)
    for i, text in enumerate(texts):
        prompt = given[i // copies]
        before = "" if chat or prompt.messages is not None else prompt.text
        print(f"\n--- {prompt.text or prompt.name}\n{before}{text}")


def _print_summary(result: dict[str, Any], written: Path | None) -> None:
    where = "" if written in (None, STDIN) else f" -> {written}"
    print(f"\n{summary(result, sum(result['tokens']))}{where}")


def summary(result: dict[str, Any], tokens: int) -> str:
    """One line about what was generated."""
    density = result["density"]
    kept = (
        "dense"
        if density is None
        else "keeping {neurons:.0%} of neurons, {groups:.0%} of heads".format(**density)
    )
    note = ", compilation included" if result["compilation_included"] else ""
    seconds, rate = result["seconds"], result["tokens_per_second"]
    return f"{tokens} tokens in {seconds:.2f} s, {rate:.0f} tokens/s{note}; {kept}"
