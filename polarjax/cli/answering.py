"""The work of `polarjax generate --prompts`: an engine continues the lines of a file."""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from polarjax.checkpoint.bundle import Bundle
from polarjax.checkpoint.loading import load_with_tokenizer
from polarjax.cli import generating, job_output
from polarjax.cli.generate_options import GenerateOptions
from polarjax.cli.inputs import placement
from polarjax.cli.many_hosts import agree_on_prompts
from polarjax.distributed.group import Group
from polarjax.distributed.start import group
from polarjax.engine import checks as engine_checks
from polarjax.engine.engine import Engine
from polarjax.engine.in_order import InOrder, Task
from polarjax.engine.requests import Event
from polarjax.engine.slots import MOST_LOGPROBS
from polarjax.errors import InputError
from polarjax.generation.checks import check_best, check_copies, check_new_tokens, check_seed
from polarjax.generation.sampling import Categorical
from polarjax.generation.settings import GenerationSettings
from polarjax.jobs.line_requests import LineRequests, error_of, tasks_apart
from polarjax.numeric import whole_number
from polarjax.progress import task as progress_task
from polarjax.selection.plans import densities
from polarjax.storage.line_file import LineStream
from polarjax.text.prompt_files import PromptFile, PromptLine
from polarjax.text.prompts import most_characters
from polarjax.text.tokenizer import Tokenizer

SOME_FAILED = 3
"""Exit code: the output is complete, but some lines have an error in place of an answer."""

_RATE_SECONDS = 5.0


def run(options: GenerateOptions) -> dict[str, Any]:
    """Answers the lines of `--prompts`, writes them to `--output` or prints the texts, returns the numbers."""
    check(options)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(PromptFile(options.prompts, options.prompt or ()))  # pyrefly: ignore[bad-argument-type]
        survey, hosts = lines.survey(), group()
        agree_on_prompts(None if survey is None else survey.checksum)
        taken = _only_line(options, lines) if options.stream else []
        output = job_output.of(options)
        if isinstance(output, LineStream):
            stack.enter_context(output)
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        bundle, tokenizer = load_with_tokenizer(
            options.folder, options.dtype, **placement(options.mesh, options.attention)
        )
        settings = generating.merged_settings(bundle.generation, options)
        _check_for_model(options, bundle, tokenizer, settings, lines)
        dense = generating.runs_dense(bundle, options)
        engine = stack.enter_context(_engine(options, bundle, dense=dense))
        requests = _requests(options, tokenizer, settings, engine.capacity)
        total = None if survey is None else survey.count
        logprobs = options.logprobs is not None or bool(survey and survey.logprobs)
        apart = tasks_apart(engine, None if dense else bundle.plans, logprobs=logprobs)
        job = Job(engine, requests, lines, None, options, total, apart, again=deque(taken))
        if isinstance(output, Path):
            flags = {"dense": dense, "apart": apart is not None, "logprobs": logprobs}
            record = job_output.record(options, bundle, settings, engine, survey, **flags)
            job.sink = stack.enter_context(job_output.opened(output, record, options))
            job.skip(job_output.written(job.sink, lines))
        else:
            job.sink = output
        if hosts is not None:
            job.skip_with_process_0(hosts)
        with _resumable(job, output):
            result = job.run()
    sparsity = None if dense else bundle.sparsity(engine.slots, options.head_density)
    result["density"] = None if sparsity is None else densities(sparsity.plan, bundle.model.config)
    _print_summary(job, result, output)
    return result | ({"exit_code": SOME_FAILED} if job.failed else {})


def check(options: GenerateOptions) -> None:
    """Raises `InputError` for options that contradict each other, or values that no model accepts."""
    generating.check(options)
    check_seed(options.seed, "--seed")
    if options.max_new_tokens is not None:
        check_new_tokens(options.max_new_tokens)
    if options.capacity is not None:
        whole_number(options.capacity, "capacity", where="--capacity")
    if options.resume and options.overwrite:
        raise InputError("--resume and --overwrite contradict each other", hint="give one of them")
    if options.logprobs is not None and options.output is None:
        raise InputError("--logprobs is for --output", hint="give --output FILE, or - for standard output")


def _only_line(options: GenerateOptions, lines: PromptFile) -> list[PromptLine]:
    """The line that is streamed; raises `InputError` if there are several."""
    found = [line for line in (lines.take(), lines.take()) if line is not None]
    generating.check_stream(options, several=len(found) > 1)
    return found


def _check_for_model(
    options: GenerateOptions,
    bundle: Bundle,
    tokenizer: Tokenizer,
    settings: GenerationSettings,
    lines: PromptFile,
) -> None:
    """Raises `InputError` for options that would fail on every line."""
    most = min(MOST_LOGPROBS, bundle.model.config.vocab_size)
    check_best(options.logprobs, most, where="--logprobs")
    engine_checks.check_stop_count(
        len(settings.stop_ids), where="--stop-id", hint="give the others as --stop"
    )
    if options.chat:
        tokenizer.check_chat_template()
    drawn = lines.has_settings and options.num_return_sequences > 1  # lines may ask for it
    check_copies(options.num_return_sequences, Categorical() if drawn else settings.sampler)


def _engine(options: GenerateOptions, bundle: Bundle, *, dense: bool) -> Engine:
    """The engine; raises `InputError` if its slots can't hold `--max-new-tokens` after the shortest prompt."""
    head_density = None if dense else options.head_density
    engine = Engine(
        bundle, slots=options.slots, capacity=options.capacity, head_density=head_density, dense=dense
    )
    try:
        if options.max_new_tokens is not None:
            limits = bundle.model.config, 1, options.max_new_tokens, None, engine.capacity
            engine_checks.check_length(*limits)
    except InputError as error:
        engine.close()
        about = {"got": error.got, "expected": error.expected, "hint": error.hint}
        raise InputError(error.what, where="--max-new-tokens", **about) from error
    if options.timed:
        engine.warm_up()
    return engine


def _requests(
    options: GenerateOptions, tokenizer: Tokenizer, settings: GenerationSettings, capacity: int
) -> LineRequests:
    return LineRequests(
        tokenizer=tokenizer,
        settings=settings,
        max_new_tokens=options.max_new_tokens,
        copies=options.num_return_sequences,
        seed=options.seed,
        logprobs=options.logprobs,
        chat=options.chat,
        system=options.system,
        most_characters=most_characters(tokenizer, capacity),
    )


@dataclasses.dataclass(eq=False)
class Job:
    """The lines on their way through the engine.

    Attributes:
      engine, requests, lines, options: what answers what, and how.
      sink: where the lines of output go; None prints the texts.
      total: number of lines, if known.
      apart: see `InOrder`.
      written: lines of output, with those that were there before.
      failed: those with an error.
      first_error: of them, what the first one says.
      tokens: new tokens so far.
      resumed: lines of output that were there before.
      begin: index of the first line that runs.
      again: lines that were taken and still have to run.
    """

    engine: Engine
    requests: LineRequests
    lines: PromptFile
    sink: LineStream | None
    options: GenerateOptions
    total: int | None
    apart: int | None
    written: int = 0
    failed: int = 0
    first_error: str = ""
    tokens: int = 0
    resumed: int = 0
    begin: int = 0
    again: deque[PromptLine] = dataclasses.field(default_factory=deque)

    def skip(self, answered: Iterable[tuple[PromptLine, str | None]]) -> None:
        """Takes the lines whose answers an interrupted run has written, each with its error; see `job_output.written`.

        With `apart`, the lines of an unfinished group run again beside the rest of it; their answers stay as written.
        """
        for line, error in answered:
            self._count(error)
            if self.apart:
                self.again.append(line)
                if self.written % self.apart == 0:
                    self.again.clear()
        self.resumed, self.begin = self.written, self.written - len(self.again)
        following = self.lines.take()
        self.again = deque() if following is None else deque([*self.again, following])

    def skip_with_process_0(self, hosts: Group) -> None:
        """Takes the lines that process 0 has skipped, as it alone sees what is written."""
        skipped = hosts.broadcast(self.resumed)
        if hosts.process_id and skipped:
            lines = (self.lines.take() for _ in range(skipped))
            self.skip((line, None) for line in lines if line is not None)

    def run(self) -> dict[str, Any]:
        """Answers the other lines; returns the numbers, and the texts if they go into no file."""
        if self.options.stream and (prompt := self.again[0].prompt) is not None:
            generating.print_prompt(prompt, self.options.chat)
        indices = itertools.count(self.begin)
        kept: list[Task] = []
        started = time.perf_counter()
        with self._progress() as watch:
            take = lambda wait: self._next_task(indices, wait)
            runner = InOrder(self.engine, take, lambda event: watch(runner, event), self.apart)
            for i, each in enumerate(runner, self.begin):
                if i < self.resumed:
                    continue
                self._put(each)
                if self.sink is None and job_output.wants_json():
                    kept.append(each)
            watch(runner, None)
        seconds = time.perf_counter() - started
        result = {"lines": self.written, "errors": self.failed, "resumed": self.resumed}
        result |= self._texts(kept) if self.sink is None else {}
        return result | {
            "total_tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "compilation_included": not self.options.timed,
            "slots": self.engine.slots,
            "capacity": self.engine.capacity,
        }

    def _put(self, done: Task) -> None:
        """Writes or prints a line of output."""
        error = error_of(done)
        if self.sink is not None:
            self.sink.write(self.requests.record(done))
        elif error is not None and self.options.stream:
            raise error
        elif error is not None:
            print(f"\npolarjax: {error}", file=sys.stderr)
        elif self.options.stream:
            print()
        else:
            prompt = done.source.prompt
            generating.print_texts([prompt], self.options.chat, [each.text for each in done.answers])
        self._count(None if error is None else str(error))

    def _count(self, error: str | None) -> None:
        self.written += 1
        self.failed += error is not None
        self.first_error = self.first_error or error or ""

    def _next_task(self, indices: Iterator[int], wait: bool) -> Task | None:
        line = self.again.popleft() if self.again else self.lines.take(wait=wait)
        return None if line is None else self.requests.task(next(indices), line)

    def _texts(self, done: list[Task]) -> dict[str, Any]:
        """Every sequence, as `generate --prompt` has it."""
        rows = [(task, each) for task in done for each in task.answers]
        endings = [self.requests.ending(*row) for row in rows]
        names = [task.source.prompt.text or task.source.name for task, _ in rows]
        return {
            "prompts": names,
            "texts": [each.text for _, each in rows],
            "tokens": [len(each.tokens) for _, each in rows],
            "stopped": [each != "length" for each in endings],
            "endings": endings,
        }

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Any]:
        """Yields a function of the runner and an event, which reports what is done."""
        if self.sink is None:  # the texts are the progress
            yield self._show
            return
        with progress_task("answering", self.total, "prompts") as advance:
            rate, shown = Rate(), self.resumed
            if shown:
                advance(shown)

            def watch(runner: InOrder, event: Event | None) -> None:
                nonlocal shown
                self._show(runner, event)
                done = max(self.begin + runner.finished - shown, 0)
                shown += done
                note = f"{runner.in_use}/{self.engine.slots} rows in use"
                advance(done, f"{rate.of(self.tokens):,.0f} tokens/s, {note}")

            yield watch

    def _show(self, _: InOrder, event: Event | None) -> None:
        if event is not None:
            self.tokens += len(event.tokens)
            if self.options.stream:
                print(event.text, end="", flush=True)


class Rate:
    """Tokens per second over the last few seconds; compilation, before the first tokens, isn't part of it."""

    def __init__(self) -> None:
        self._begin: tuple[float, int] | None = None
        self._last: float | None = None

    def of(self, tokens: int) -> float:
        """The rate, given the tokens so far."""
        now = time.monotonic()
        since, before = self._begin = self._begin or (now, tokens)
        rate = (tokens - before) / max(now - since, 1e-9)
        if now - since >= _RATE_SECONDS:
            self._begin, self._last = (now, tokens), rate
        return rate if self._last is None else self._last


@contextlib.contextmanager
def _resumable(job: Job, output: Any) -> Iterator[None]:
    """Says, if the block is interrupted, where what was done is."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if isinstance(output, Path):
            print(f"polarjax: {output} has {job.written:,} lines; --resume goes on", file=sys.stderr)
        raise


def _print_summary(job: Job, result: dict[str, Any], output: Any) -> None:
    where = f" -> {output}" if isinstance(output, Path) else ""
    to = sys.stderr if isinstance(output, LineStream) else sys.stdout
    lines = "1 prompt" if job.written == 1 else f"{job.written:,} prompts"
    lines += f", {job.resumed:,} of them before" if job.resumed else ""
    print(f"\n{lines}; {generating.summary(result, job.tokens)}{where}", file=to)
    if job.failed:
        many = f"{job.failed:,} of {job.written:,} prompts have no answer, the first because of this: "
        print(f"polarjax: {many}{job.first_error}", file=sys.stderr)
