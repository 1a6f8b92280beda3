"""`polarjax tune`: heals a model by distillation, so that skipping heads costs less."""

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import typer

from polarjax.cli import learning
from polarjax.cli.inputs import random_key, window_length
from polarjax.errors import CheckpointError, InputError, SparsityError
from polarjax.numeric import spread
from polarjax.sparsity import tune_options
from polarjax.sparsity.tune_options import TuneOptions
from polarjax.storage.atomic import absolute, alone, check_free, check_writable
from polarjax.types import Int32

if TYPE_CHECKING:
    from polarjax.checkpoint.bundle import Bundle
    from polarjax.sparsity.tuning import TuneReport
    from polarjax.text.tokenizer import Tokenizer

_DEFAULTS = TuneOptions(tokens=1)
_LEAST, _MOST = _DEFAULTS.densities
_HELD_OUT = 64  # most windows of a text that are held out
_OWN = 8192  # most windows that the model writes
_OWN_LEAST = 64  # for a run that is limited by minutes: fewer would be repeated too often
_OWN_PER_MINUTE = 1600  # an H200 writes so many of 512 tokens in 10 s, with a model of 135M parameters

Least = Annotated[float, typer.Option(help="Lowest fraction of heads to heal for.", show_default="1/3")]
Most = Annotated[float, typer.Option(help="Highest fraction of heads to heal for.", show_default="2/3")]
OwnText = Annotated[
    float,
    typer.Option(
        help="Fraction of the training on text that the model writes itself first: as many windows as --tokens need, "
        f"at most {_OWN_PER_MINUTE:,} for each of --minutes (at least {_OWN_LEAST}), and at most {_OWN:,}."
    ),
]
Train = Annotated[
    str,
    typer.Option(help="What changes besides the routers: all, attention, out, bias or routers (nothing)."),
]
RouterWidth = Annotated[
    int,
    typer.Option(help="Units of the hidden layer that linear head routers get; 0: they stay linear."),
]


def tune(
    folder: learning.Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model directory to make.")],
    text: learning.Texts,
    tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens of training.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this many minutes of training.")] = None,
    train: Train = _DEFAULTS.train,
    least: Least = _LEAST,
    most: Most = _MOST,
    dense_share: Annotated[
        float, typer.Option(help="Fraction of the training that keeps all heads.")
    ] = _DEFAULTS.dense_share,
    own_text: OwnText = 0.0,
    window: learning.Window = None,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.")] = _DEFAULTS.batch_size,
    accumulate: Annotated[int, typer.Option(help="Forward passes per step.")] = _DEFAULTS.accumulate,
    learning_rate: Annotated[
        float, typer.Option(help="Adam's learning rate for the model.")
    ] = _DEFAULTS.learning_rate,
    router_learning_rate: Annotated[
        float, typer.Option(help="Adam's learning rate for the routers.")
    ] = _DEFAULTS.router_learning_rate,
    router_width: RouterWidth = _DEFAULTS.router_width,
    activation: Annotated[
        str | None, typer.Option(help="relu: turn the activation into ReLU, so that neurons become sparse.")
    ] = None,
    l1: Annotated[
        float,
        typer.Option(
            help="Weight of a penalty on active neurons, for ReLU models and --activation relu; for example 0.3."
        ),
    ] = _DEFAULTS.l1,
    blend: Annotated[
        float,
        typer.Option(
            help="How far the result goes from the first weights to the trained ones; 0.8 stays closer to the old model."
        ),
    ] = _DEFAULTS.blend,
    save_minutes: Annotated[
        float, typer.Option(help="Save the state this often, beside OUT, for --resume.")
    ] = _DEFAULTS.save_minutes,
    devices: Annotated[
        int | None,
        typer.Option(help="Devices to divide each batch over; default: as many as divide it evenly."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing model directory.")
    ] = False,
    seed: learning.Seed = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype to compute in; default: bfloat16, on a CPU float32.")
    ] = None,
) -> dict[str, Any]:
    """Heal a model: train it, and its routers, to lose less when heads are skipped."""
    return _heal(Request(**locals()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The command's arguments; see `tune`."""

    folder: Path
    out: Path
    text: list[Path]
    tokens: int | None
    minutes: float | None
    train: str
    least: float
    most: float
    dense_share: float
    own_text: float
    window: int | None
    batch: int
    accumulate: int
    learning_rate: float
    router_learning_rate: float
    router_width: int
    activation: str | None
    l1: float
    blend: float
    save_minutes: float
    devices: int | None
    resume: bool
    overwrite: bool
    seed: int
    dtype: str | None

    @property
    def options(self) -> TuneOptions:
        """What to train, and when to stop."""
        return TuneOptions(
            tokens=self.tokens,
            minutes=self.minutes,
            batch_size=self.batch,
            accumulate=self.accumulate,
            densities=(self.least, self.most),
            dense_share=self.dense_share,
            train=cast(tune_options.Subset, self.train),
            learning_rate=self.learning_rate,
            router_learning_rate=self.router_learning_rate,
            router_width=self.router_width,
            activation=cast(Any, self.activation),
            l1=self.l1,
            blend=self.blend,
            save_minutes=self.save_minutes,
            dtype=self.dtype,
        )


def _heal(asked: Request) -> dict[str, Any]:
    from polarjax.checkpoint.bundle import save
    from polarjax.checkpoint.loading import load_with_tokenizer
    from polarjax.checkpoint.writer import is_model_directory
    from polarjax.sparsity.tuning import tune as tune_model

    options, key = asked.options, random_key(asked.seed)
    _check_own(asked.own_text)
    target = absolute(asked.out)
    check_free(target, asked.overwrite, is_model_directory)
    state = target.with_name(f"{target.name}.tuning")
    check_writable(target.parent)
    with alone(state):
        _check_state(state, resume=asked.resume, overwrite=asked.overwrite)
        bundle, tokenizer = load_with_tokenizer(asked.folder)
        if bundle.routers is None:
            hint = f"run polarjax sparsify {asked.folder} --text FILE first"
            raise SparsityError("the model has no routers yet", where=asked.folder, hint=hint)
        domains, held_out = _windows(bundle, tokenizer, asked.text, asked.window)
        _check_neurons(bundle, domains, asked.activation)
        shares = [(1 - asked.own_text) / len(domains)] * len(domains)
        written = domains
        if asked.own_text:
            length = domains[0].shape[1]
            count = own_count(asked, length)
            print(
                f"The model writes {count:,} windows of {length} tokens first, for --own-text {asked.own_text:g}."
            )
            written = [*domains, _written(bundle, tokenizer, count, length, key)]
            shares = [*shares, asked.own_text]
        model, routers, report = tune_model(
            bundle.model,
            bundle.routers,
            written,
            key,
            options=options,
            shares=shares,
            held_out=held_out,
            dense_layers=(0,) if bundle.plans is None else bundle.plans.dense_layers,
            budgets=() if bundle.plans is None else bundle.plans.budgets,
            folder=state,
            resume=asked.resume,
            devices=asked.devices,
        )
        _print(report, asked.activation)
        with _kept(state):
            healed = _with_neurons(bundle, model, routers, domains, key)
            save(target, healed, overwrite=asked.overwrite)
        if model.config.neuron_sparsity and healed.plans is not None:
            learning.print_neurons(healed.plans)
        shutil.rmtree(state, ignore_errors=True)
        print(f"The healed model is in {target}. Next: polarjax eval perplexity {target} --text FILE")
        return report.to_json()


@contextlib.contextmanager
def _kept(state: Path) -> Iterator[None]:
    """Says in the error of the block where the trained state is."""
    from polarjax.sparsity.tuning_state import is_state

    try:
        yield
    except CheckpointError as error:
        if not is_state(state):
            raise
        hint = f"make room, and finish with --resume: what was trained is in {state}"
        about = {"where": error.where, "got": error.got, "expected": error.expected}
        raise CheckpointError(error.what, **about, hint=hint) from error


def _check_neurons(bundle: "Bundle", domains: list[Int32[np.ndarray, "n T"]], activation: str | None) -> None:
    """Raises `InputError` if the text is too short to learn the healed model's neurons from."""
    from polarjax.sparsity.pipeline import check_neuron_text

    config = bundle.model.config
    changes: dict[str, Any] = {} if activation is None else {"activation": activation}
    healed = dataclasses.replace(config, **changes)
    check_neuron_text(healed, _for_neurons(domains), bundle.model, bundle.plans)


def _check_state(state: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises `CheckpointError` if an interrupted run would be lost, isn't there to resume, or is something else."""
    from polarjax.sparsity.tuning_state import find_state, is_state

    if resume:
        find_state(state)
    elif os.path.lexists(state) and not overwrite:
        hint = "continue it with --resume, or start over with --overwrite"
        raise CheckpointError("an interrupted run of tune is here", where=state, hint=hint)
    check_free(state, True, is_state)


def _check_own(share: float) -> None:
    """Raises `InputError` unless `share` is the value of --own-text."""
    if not 0 <= share < 1:
        hint = "give for example .2"
        raise InputError("no fraction", where="--own-text", got=share, expected="0 to below 1", hint=hint)


def _windows(
    bundle: "Bundle", tokenizer: "Tokenizer", text: list[Path], window: int | None
) -> tuple[list[Int32[np.ndarray, "n T"]], Int32[np.ndarray, "n T"]]:
    """The windows of each text to train on, and those held out of all of them."""
    from polarjax.text.corpus import read_text
    from polarjax.text.token_windows import text_windows

    length = window_length(window, bundle.model.config)
    domains, held_out = [], []
    for path in text:
        rows = text_windows([read_text(path)], tokenizer, length, source=str(path))
        if len(rows) < 2:
            raise InputError(
                "the text is too short to train on",
                where=path,
                got=f"{len(rows)} windows of {length} tokens",
                expected="at least 2, one of them to measure on",
                hint="use a longer text or a smaller --window",
            )
        out = np.zeros(len(rows), bool)
        out[spread(len(rows), min(_HELD_OUT, max(1, len(rows) // 50)))] = True
        domains.append(rows[~out])
        held_out.append(rows[out])
    return domains, np.concatenate(held_out)


def own_count(asked: Request, length: int) -> int:
    """Windows of this length that the model writes: what tokens and minutes of training have a use and time for."""
    most = [_OWN]
    if asked.tokens is not None:
        most.append(math.ceil(asked.tokens * asked.own_text / length))
    if asked.minutes is not None:
        most.append(max(_OWN_LEAST, math.ceil(asked.minutes * _OWN_PER_MINUTE)))
    return min(most)


def _written(
    bundle: "Bundle", tokenizer: "Tokenizer", count: int, length: int, key: Any
) -> Int32[np.ndarray, "n T"]:
    import jax

    from polarjax.sparsity.own_text import own_windows

    keys = jax.random.split(jax.random.fold_in(key, 1))
    bos = tokenizer.bos_id
    if not tokenizer.bos_is_optional or count < 2:
        return own_windows(bundle.model, count, length, keys[0], first=bos)
    halves = ((bos, count - count // 2), (None, count // 2))  # prompts come both ways
    written = [
        own_windows(bundle.model, n, length, k, first=b) for k, (b, n) in zip(keys, halves, strict=True)
    ]
    return np.concatenate(written)


def _print(report: "TuneReport", activation: str | None) -> None:
    memory = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in report.memory.items())
    peak = "" if report.peak is None else f"; most in use: {report.peak / 1e9:.2f} GB"
    print(f"\nMemory of a step, as planned: {memory}{peak}")
    print(
        f"{report.steps:,} steps, {report.tokens:,} tokens in {report.seconds:,.0f} s "
        f"({report.tokens_per_second:,.0f} tokens/s)"
    )
    if report.neurons:
        each = " ".join(f"{active:.2f}" for active in report.neurons)
        print(f"\nNeurons that a token activates, by layer: {each}; mean {np.mean(report.neurons):.3f}")
    print()
    learning.print_perplexities(report, "held-out", activation)


def _for_neurons(domains: list[Int32[np.ndarray, "n T"]]) -> Int32[np.ndarray, "n T"]:
    """The windows that neurons are learned from: as many of each text, up to the default of sparsify."""
    each = max(1, learning.MAX_TOKENS // domains[0].shape[1] // len(domains))
    return np.concatenate([rows[:each] for rows in domains])


def _with_neurons(bundle: "Bundle", model: Any, routers: Any, domains: list, key: Any) -> "Bundle":
    """The bundle with the healed model; neurons, if it has sparse ones, are learned again."""
    from polarjax.sparsity.pipeline import learn_neurons

    source = dict(bundle.source_config or {})
    if model.config.activation != bundle.model.config.activation:
        source |= {
            name: model.config.activation for name in ("hidden_act", "activation_function") if name in source
        }
    kept = dataclasses.replace(bundle, source_config=source or None).with_model(model)
    routers, plans = learn_neurons(model, routers, bundle.plans, _for_neurons(domains), key)
    return dataclasses.replace(kept, routers=routers, plans=plans)
