"""Shared by the verbs of `polarjax eval` that sweep over a text: options, the run, the report and the picture."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polarjax.cli.inputs import check_dense, placement, window_length
from polarjax.cli.many_hosts import agree_on_texts, agreed
from polarjax.errors import InputError

if TYPE_CHECKING:
    from polarjax.checkpoint.bundle import Bundle
    from polarjax.evaluation.parting import GreedyOptions
    from polarjax.evaluation.report import Columns, Report
    from polarjax.text.token_windows import ScoredWindows
    from polarjax.text.tokenizer import Tokenizer

Folder = Annotated[Path, typer.Argument(help="A model directory.")]
Texts = Annotated[list[Path], typer.Option(help="A UTF-8 text (.txt, .txt.xz); may be given several times.")]
Densities = Annotated[
    str | None,
    typer.Option(help="Fractions of heads (groups) to keep, as in .25,.5; default: as calibrated."),
]
Selectors = Annotated[
    str, typer.Option(help="What chooses: router, oracle, random, static; several as in router,oracle.")
]
Protocols = Annotated[
    str, typer.Option(help="masked: at every position, as published; decode: as generate does; or both.")
]
BatchSizes = Annotated[
    str | None, typer.Option(help="Windows decoded together, as in 1,16; default: 8, or all if fewer.")
]
Window = Annotated[int | None, typer.Option(help="Tokens per window; default: up to 512.")]
Stride = Annotated[
    int | None,
    typer.Option(help="Tokens from one window's start to the next; default: windows don't overlap."),
]
MaxTokens = Annotated[int, typer.Option(help="Maximum number of tokens to score, spread evenly.")]
Context = Annotated[int, typer.Option(help="Tokens at the start of a window, read dense and not scored.")]
Neurons = Annotated[str, typer.Option(help="Neurons of a ReLU model: plan (as calibrated) or dense (all).")]
DenseLayers = Annotated[
    str | None, typer.Option(help="Layers that keep all heads, as in 0,1; default: as calibrated, or 0.")
]
StaticText = Annotated[
    list[Path] | None, typer.Option(help="Another text, whose averages selector static takes.")
]
Seed = Annotated[int, typer.Option(help="Seed of selector random.")]
Dense = Annotated[bool, typer.Option("--dense", help="Measure only the dense model.")]
Dtype = Annotated[str | None, typer.Option(help="Dtype to compute in; default: as stored.")]
ReportFile = Annotated[Path | None, typer.Option(help="Write everything that is measured to this JSON file.")]
Picture = Annotated[Path | None, typer.Option(help="Draw perplexity by density (.png, .pdf, .svg).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]

MAX_TOKENS = 32_768


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options that the verbs share, with the same names."""

    folder: Path
    text: list[Path]
    densities: str | None
    selectors: str
    protocols: str
    batch_sizes: str | None
    window: int | None
    stride: int | None
    max_tokens: int
    context: int
    neurons: str
    dense_layers: str | None
    static_text: list[Path] | None
    seed: int
    dense: bool
    dtype: str | None
    mesh: str | None
    attention: str | None
    report: Path | None
    picture: Path | None
    overwrite: bool


def run(options: EvalOptions, columns: "Columns", greedy: "GreedyOptions | None" = None) -> dict[str, Any]:
    """Measures, prints a table, and writes the report and the picture completely or not at all."""
    from polarjax.evaluation.pictures import draw, picture_kind
    from polarjax.storage.atomic import atomic_file, dump_json

    options = agreed(options)
    wanted = _numbers(options)
    _check_files(options, wanted["selectors"])
    with contextlib.ExitStack() as stack:
        outputs = {}
        for name, path in (("report", options.report), ("picture", options.picture)):
            kind = picture_kind(path) if name == "picture" and path is not None else ""
            if path is not None:
                outputs[name] = stack.enter_context(atomic_file(path, overwrite=options.overwrite)), kind
        measured = _measure(options, wanted, greedy)
        print("{windows} windows of {window} tokens, {scored_tokens} tokens scored".format(**measured.text))
        print(measured.table(columns))  # before anything is written, which may fail
        found = measured.to_json()
        if "report" in outputs:
            dump_json(outputs["report"][0], found)
        if "picture" in outputs:
            stream, kind = outputs["picture"]
            draw(measured, stream.buffer, kind)
    return found


def _check_files(options: EvalOptions, selectors: Sequence[str]) -> None:
    """Raises `InputError` if a file would have no use, or two outputs are one file."""
    if options.static_text and "static" not in selectors:
        hint = "give --selectors static too, or leave it out"
        raise InputError("--static-text is for selector static", got=", ".join(selectors), hint=hint)
    files = [path.absolute() for path in (options.report, options.picture) if path is not None]
    if len(set(files)) < len(files):
        raise InputError("--report and --picture are one file", got=files[0], hint="give two names")


def _numbers(options: EvalOptions) -> dict[str, Any]:
    """The options that are lists, as arguments of `sweep`."""
    check_dense(options.dense, options.densities, option="--densities")
    wanted: dict[str, Any] = {
        "selectors": () if options.dense else _words(options.selectors),
        "protocols": _words(options.protocols),
    }
    if options.batch_sizes is not None:
        wanted["batch_sizes"] = _list(options.batch_sizes, int, "--batch-sizes", "1,16")
    if options.densities is not None:
        wanted["densities"] = _list(options.densities, float, "--densities", ".25,.5")
    if options.dense_layers is not None:
        wanted["dense_layers"] = _list(options.dense_layers, int, "--dense-layers", "0,1")
    return wanted


def _words(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _list[T](text: str, kind: Callable[[str], T], option: str, example: str) -> list[T]:
    """The numbers of an option; raises `InputError` for anything else."""
    try:
        return [kind(each) for each in _words(text)]
    except ValueError:
        raise InputError(
            "not numbers", where=option, got=repr(text), hint=f"separate them by commas, as in {example}"
        ) from None


def _measure(options: EvalOptions, wanted: dict[str, Any], greedy: "GreedyOptions | None") -> "Report":
    from polarjax.checkpoint.loading import load_with_tokenizer
    from polarjax.evaluation import static_selector, sweep

    texts, described = _read(options.text)
    source: dict[str, Any] = {"path": str(options.folder), "texts": described}
    has_static = bool(options.static_text) and "static" in wanted["selectors"]
    others: list[str] = []
    if has_static:
        others, source["static_texts"] = _read(options.static_text or [])
        _check_other(described, source["static_texts"])
    bundle, tokenizer = load_with_tokenizer(
        options.folder, options.dtype, **placement(options.mesh, options.attention)
    )
    if "router" in wanted["selectors"]:
        bundle.require("routers", where=str(options.folder))
    windows = _cut(options, texts, bundle, tokenizer)
    static = None
    if has_static:
        cut = _cut(options, others, bundle, tokenizer, stride=False, source=options.static_text)
        static = static_selector(bundle.model, cut.tokens)
    return sweep(
        bundle,
        windows,
        **wanted,
        context=options.context,
        neurons=options.neurons,  # pyrefly: ignore[bad-argument-type]
        static=static,
        greedy=greedy,
        seed=options.seed,
        source=source,
    )


def _read(paths: list[Path]) -> tuple[list[str], list[dict[str, Any]]]:
    """Texts, and how the report identifies each: its name, size, and the checksum of its UTF-8 bytes."""
    from polarjax.text.corpus import read_text

    texts, described = [read_text(path) for path in paths], []
    for path, text in zip(paths, texts, strict=True):
        raw = text.encode()
        described.append({"name": str(path), "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    agree_on_texts({"their texts": [each["sha256"][:16] for each in described]})
    return texts, described


def _cut(
    options: EvalOptions,
    texts: list[str],
    bundle: "Bundle",
    tokenizer: "Tokenizer",
    *,
    stride: bool = True,
    source: list[Path] | None = None,
) -> "ScoredWindows":
    from polarjax.text.token_windows import scored_windows

    length = window_length(options.window, bundle.model.config)
    step = options.stride if stride else None
    # The first window scores all of its tokens, the others a stride each.
    more = (options.max_tokens - length) // max(step or length, 1)
    return scored_windows(
        texts,
        tokenizer,
        length,
        stride=step,
        most=1 + more,
        source=", ".join(map(str, source or options.text)),
    )


def _check_other(evaluated: list[dict[str, Any]], static: list[dict[str, Any]]) -> None:
    """Raises `InputError` if a text of the static selector is one that is evaluated."""
    seen = {each["sha256"] for each in evaluated}
    for each in static:
        if each["sha256"] in seen:
            raise InputError(
                "the static selector would have seen the evaluated text",
                where="--static-text",
                got=each["name"],
                hint="give another text of the same kind",
            )
