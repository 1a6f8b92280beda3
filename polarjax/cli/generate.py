"""`polarjax generate`: continue prompts with a model directory, dense or sparse."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polarjax.cli.inputs import random_key
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError, InputError
from polarjax.progress import task
from polarjax.selection.plans import densities
from polarjax.storage.atomic import atomic_file

if TYPE_CHECKING:
    from polarjax.checkpoint.bundle import Bundle
    from polarjax.generation.settings import GenerationSettings
    from polarjax.selection.selectors import Sparsity
    from polarjax.text.assembly import Completion
    from polarjax.text.continuation import Show
    from polarjax.text.prompts import Prompt
    from polarjax.text.tokenizer import Tokenizer
    from polarjax.types import Array, Key

DEFAULT_NEW_TOKENS = 64


def generate(
    folder: Annotated[Path, typer.Argument(help="A model directory.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with a prompt on each line: .jsonl objects, or text.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A .jsonl file for what is written.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Prompts at a time; default: all.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens for each prompt; default: the model's, or 64.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Draw at this temperature.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the nucleus of this probability.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: make tokens less likely that are there already.")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Most likely tokens, whatever the model asks.")
    ] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before; may be repeated.")] = None,
    stop_id: Annotated[
        list[int] | None, typer.Option(help="Token id to end at, not the model's own.")
    ] = None,
    num_return_sequences: Annotated[int, typer.Option(help="Sequences to draw for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are what a user says; use the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: what the system says first.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show the text of one prompt while it comes.")
    ] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Skip nothing, even if there are routers.")] = False,
    head_density: Annotated[float | None, typer.Option(help="Fraction of heads (groups) to keep.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation; default: as stored.")] = None,
    timed: Annotated[bool, typer.Option("--timed", help="Run twice and time the compiled run.")] = False,
) -> dict[str, Any]:
    """Continue prompts: sparse where the model has routers, dense otherwise.

    How tokens are drawn, and at which ids a text ends, is what the model's generation_config.json asks for; the
    options here override it.
    """
    from polarjax.checkpoint.bundle import load_with_tokenizer
    from polarjax.cli.sampling_options import check_options, with_options, with_stops
    from polarjax.generation.batch import check_copies
    from polarjax.text.prompts import Prompt

    if dense and head_density is not None:
        raise InputError("--dense and --head-density contradict each other", hint="give one of them")
    if system is not None and not chat:
        raise InputError("--system is part of a chat", hint="give --chat too, or leave it out")
    if batch_size is not None and batch_size < 1:
        raise InputError("no prompts in a batch", where="--batch-size", got=batch_size, hint="give 1 or more")
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
    }
    check_options(**options)
    key = random_key(seed)
    given = [*(Prompt.of(text, f"prompt {i}") for i, text in enumerate(prompt or [], 1)), *_read(prompts)]
    if not given:
        raise InputError("no prompt", hint="give --prompt TEXT or --prompts FILE")
    if stream and (len(given) > 1 or num_return_sequences > 1 or output is not None or timed):
        raise InputError(
            "--stream shows one sequence", hint="give one --prompt, without --output and --timed"
        )
    with contextlib.ExitStack() as stack:
        file = None if output is None else stack.enter_context(atomic_file(output, overwrite=overwrite))
        bundle, tokenizer = load_with_tokenizer(folder, dtype)
        settings = with_stops(with_options(bundle.generation, greedy=greedy, **options), stop, stop_id)
        check_copies(num_return_sequences, settings.sampler)
        for note in settings.notes:
            print(note, file=sys.stderr)
        if not dense and head_density is None and (why := _why_dense(bundle)):
            print(why)
        rows = [each.ids(tokenizer, chat=chat, system=system) for each in given]
        job = _Job(
            bundle=bundle,
            tokenizer=tokenizer,
            settings=settings,
            max_new_tokens=_room(given, rows, bundle.model.config, max_new_tokens, settings),
            copies=num_return_sequences,
            batch_size=min(batch_size or len(given), len(given)),
            dense=dense,
            head_density=head_density,
            key=key,
        )
        if timed:
            job.run(rows)
        started = time.perf_counter()
        made = job.run(rows, show=_show(given[0], chat) if stream else None)
        seconds = time.perf_counter() - started
        _check_finite(made, folder)
        if file is not None:
            for i, each in enumerate(given):
                file.write(each.completed(made[i * job.copies : (i + 1) * job.copies]) + "\n")
    names = [each.text or each.name for each in given for _ in range(job.copies)]
    result = _result(names, made, seconds, timed=timed, density=job.density)
    if not stream and output is None:
        _print_texts(given, chat, result["texts"])
    _print_summary(result, output)
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """How all prompts are continued, batch by batch."""

    bundle: "Bundle"
    tokenizer: "Tokenizer"
    settings: "GenerationSettings"
    max_new_tokens: int
    copies: int
    batch_size: int
    dense: bool
    head_density: float | None
    key: "Key[Array, '']"

    def run(self, rows: Sequence[Sequence[int]], *, show: "Show | None" = None) -> "list[Completion]":
        """The completions of all rows in their order, `copies` for each."""
        import jax

        from polarjax.text.continuation import continue_rows

        made = []
        starts = range(0, len(rows), self.batch_size)
        with task("generating", len(rows), "prompts") if len(starts) > 1 else _no_task() as advance:
            for i, start in enumerate(starts):
                batch = rows[start : start + self.batch_size]
                made += continue_rows(
                    self.bundle.model,
                    self.tokenizer,
                    batch,
                    jax.random.fold_in(self.key, i) if i else self.key,
                    settings=self.settings,
                    max_new_tokens=self.max_new_tokens,
                    copies=self.copies,
                    sparsity=self.sparsity(len(batch) * self.copies),
                    show=show,
                )
                advance(len(batch))
        return made

    def sparsity(self, batch_size: int) -> "Sparsity | None":
        """What is skipped in a batch of so many sequences."""
        if self.dense or (self.head_density is None and _why_dense(self.bundle)):
            return None
        return self.bundle.sparsity(batch_size, self.head_density)

    @property
    def density(self) -> dict[str, float] | None:
        """What the first batch keeps; None: everything."""
        sparsity = self.sparsity(self.batch_size * self.copies)
        return None if sparsity is None else densities(sparsity.plan, self.bundle.model.config)


def _why_dense(bundle: "Bundle") -> str | None:
    """A line about what the model lacks to be sparse; None if it lacks nothing."""
    if bundle.routers is None:
        return "The model has no routers yet, so this is dense; polarjax sparsify learns them."
    if bundle.plans is None:
        return "The model has no plans yet, so this is dense; polarjax calibrate makes them."
    return None


@contextlib.contextmanager
def _no_task():
    yield lambda steps: None


def _read(file: Path | None) -> "list[Prompt]":
    from polarjax.text.prompts import read_prompt_file

    return [] if file is None else read_prompt_file(file)


def _room(
    given: "Sequence[Prompt]",
    rows: Sequence[Sequence[int]],
    config: ModelConfig,
    wanted: int | None,
    settings: "GenerationSettings",
) -> int:
    """How many new tokens there are to be; a number that was asked for has to fit every prompt."""
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    room = config.max_positions + 1 - len(rows[longest])  # the last new token is never read
    if wanted is None:
        wanted = min(settings.max_new_tokens or DEFAULT_NEW_TOKENS, max(room, 1))
    if wanted > room:
        raise InputError(
            "the sequence would outgrow the model's positions",
            where=given[longest].name,
            got=f"{len(rows[longest])} prompt tokens + {wanted} new ones",
            expected=f"at most {config.max_positions} before the last one",
            hint="shorten the prompt or lower --max-new-tokens",
        )
    return wanted


def _show(prompt: "Prompt", chat: bool) -> "Show":
    """Prints new text at once, behind the prompt if the text goes on from it."""
    if not chat and prompt.messages is None:
        print(prompt.text, end="", flush=True)
    return lambda pieces: print(pieces[0], end="", flush=True)


def _check_finite(made: "Sequence[Completion]", folder: Path) -> None:
    failed = [i for i, each in enumerate(made) if each.ending == "failed"]
    if failed:
        raise CheckpointError(
            f"the model computes NaN or infinity in {len(failed)} of {len(made)} sequences",
            where=folder,
            got=f"sequence {failed[0] + 1} after {len(made[failed[0]].tokens)} tokens",
            hint="compute with --dtype float32, or convert an undamaged checkpoint",
        )


def _result(
    names: list[str],
    made: "Sequence[Completion]",
    seconds: float,
    *,
    timed: bool,
    density: dict[str, float] | None,
) -> dict[str, Any]:
    counts = [len(each.tokens) for each in made]
    return {
        "prompts": names,
        "texts": [each.text for each in made],
        "tokens": counts,
        "stopped": [each.ending != "length" for each in made],
        "endings": [each.ending for each in made],
        "seconds": seconds,
        "tokens_per_second": sum(counts) / seconds,
        "compilation_included": not timed,
        "density": density,
    }


def _print_texts(given: "Sequence[Prompt]", chat: bool, texts: Sequence[str]) -> None:
    copies = len(texts) // len(given)
    for i, text in enumerate(texts):
        prompt = given[i // copies]
        before = "" if chat or prompt.messages is not None else prompt.text
        print(f"\n--- {prompt.text or prompt.name}\n{before}{text}")


def _print_summary(result: dict[str, Any], written: Path | None) -> None:
    density = result["density"]
    kept = (
        "dense"
        if density is None
        else "keeping {neurons:.0%} of neurons, {groups:.0%} of heads".format(**density)
    )
    note = ", compilation included" if result["compilation_included"] else ""
    total, seconds, rate = sum(result["tokens"]), result["seconds"], result["tokens_per_second"]
    where = "" if written is None else f" -> {written}"
    print(f"\n{total} tokens in {seconds:.2f} s, {rate:.0f} tokens/s{note}; {kept}{where}")
