"""The `polarjax` command. A verb's code is imported when that verb is called, so that help is instant.

A verb is a plain function with typer annotations. It prints text for people and returns a dict for
programs, which must be convertible to JSON. With `--json`, which every verb gets here, standard output is
that dict alone and the printed text goes to standard error. A verb that did only part of its work has the exit code in
the dict, as `exit_code`. A new verb is one line in `VERBS`; a verb of a group
(`eval perplexity`) is a line with both words.
"""

import contextlib
import functools
import gc
import importlib
import inspect
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import PurePath
from typing import Annotated, Any, NamedTuple

import typer

from polarjax.cli.compile_cache import OFF, compile_cache
from polarjax.cli.many_hosts import FLAGS as HOSTS
from polarjax.cli.many_hosts import INTERRUPTED, joined
from polarjax.errors import PolarjaxError, ran_out, read_hint

BAD_INPUT = 2  # exit code; typer uses the same for a wrong option
TERMINATED = 128 + signal.SIGTERM  # the exit code that shells use


class Verb(NamedTuple):
    """What the command knows of a verb without loading it.

    Attributes:
      function: where its function is, `module:function`.
      summary: the line that `polarjax --help` shows.
      compiles: whether it compiles programs.
      many_hosts: whether it can run as several processes.
    """

    function: str
    summary: str
    compiles: bool = True
    many_hosts: bool = False


VERBS = {
    "convert": Verb(
        "polarjax.cli.convert:convert",
        "Turn a HuggingFace checkpoint into a model directory.",
        compiles=False,
    ),
    "sparsify": Verb("polarjax.cli.sparsify:sparsify", "Collect, train routers and calibrate in one step."),
    "collect": Verb("polarjax.cli.collect:collect", "Record which neurons and heads a text makes active."),
    "train-routers": Verb("polarjax.cli.train_routers:train_routers", "Learn to predict that activity."),
    "calibrate": Verb("polarjax.cli.calibrate:calibrate", "Find how many neurons each batch size needs."),
    "tune": Verb("polarjax.cli.tune:tune", "Heal a model so that skipping heads costs less."),
    "generate": Verb("polarjax.cli.generate:generate", "Continue prompts, dense or sparse.", many_hosts=True),
    "serve": Verb("polarjax.cli.serve:serve", "Answer requests over HTTP, as OpenAI's interface does."),
    "eval perplexity": Verb(
        "polarjax.cli.eval_perplexity:eval_perplexity",
        "Measure perplexity on text, dense and sparse.",
        many_hosts=True,
    ),
    "eval agreement": Verb(
        "polarjax.cli.eval_agreement:eval_agreement",
        "Measure how often sparse and dense predict and write the same.",
        many_hosts=True,
    ),
    "eval harness": Verb("polarjax.cli.eval_harness:harness", "Run tasks of lm-evaluation-harness."),
    "export": Verb(
        "polarjax.cli.export:export", "Write a model directory as a HuggingFace folder.", compiles=False
    ),
    "inspect": Verb(
        "polarjax.cli.inspect:inspect",
        "Show what a checkpoint is, what fits and what is supported.",
        compiles=False,
    ),
    "demo": Verb("polarjax.cli.demo:demo", "Run everything on the small model that comes with polarjax."),
}

GROUPS = {"eval": "Measure the quality of sparse decoding against dense."}
"""The first words of verbs that have two, and the line that `polarjax --help` shows."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 on success, 2 with one line on standard error on bad input, 130 on Ctrl-C.

    `generate --prompts` exits with 3 if some lines of the file have no answer.

    Args:
        arguments: the words after `polarjax`; by default those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        _escape_unprintable(stream)
    try:
        with _rare_garbage_collection():
            _app(_verb_of(words))(args=words, prog_name="polarjax")
    except KeyboardInterrupt:  # during the verb's import; later typer catches it
        sys.exit(INTERRUPTED)


def _verb_of(words: Sequence[str]) -> str:
    """The verb that the words call: the first that is no option, and the next after a group's name."""
    named = [word for word in words if not word.startswith("-")]
    return " ".join(named[: 2 if named[:1] and named[0] in GROUPS else 1])


@contextlib.contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Makes Python look for garbage less often: a tenth of the start, where imports make many objects but no garbage."""
    before = gc.get_threshold()
    gc.set_threshold(10_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _escape_unprintable(stream: Any) -> None:
    """Prints characters that `stream` can't encode as `\\xe9` instead of failing; keeps `:replace` and the like."""
    if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _app(called: str) -> typer.Typer:
    """The command, with the function of `called` loaded; other verbs have only names and summaries."""
    app = _typer("Contextually sparse decoding of large language models in JAX.")
    app.callback()(_options)
    groups: dict[str, typer.Typer] = {}
    for name, verb in VERBS.items():
        function = _command(verb) if name == called else _not_called
        group, _, member = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = _typer(GROUPS[group])
            app.add_typer(groups[group], name=group, short_help=GROUPS[group])
        groups.get(group, app).command(member, short_help=verb.summary)(function)
    return app


def _typer(text: str) -> typer.Typer:
    return typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help=text,
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"polarjax {version('polarjax')}")
        raise typer.Exit


def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None: ...


def _not_called() -> None: ...


def _command(verb: Verb) -> Callable[..., None]:
    """Loads a verb's function and gives it `--json`, the compile cache, progress lines and one-line errors."""
    module, _, name = verb.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    flags = _JSON | (_CACHE if verb.compiles else {}) | (HOSTS if verb.many_hosts else {})

    @functools.wraps(function)
    def command(*args: Any, as_json: bool, no_cache: bool = False, **kwargs: Any) -> None:
        from polarjax.progress import show_lines

        hosts = {name: kwargs.pop(name) for name in flags if name in HOSTS}
        with unwound_by_sigterm(), _never_ignored(), _errors_in_one_line(), joined(**hosts) as speaks:
            as_json = as_json and speaks
            with (
                _errors_in_one_line(),
                show_lines(),
                compile_cache(not no_cache) if verb.compiles else contextlib.nullcontext(),
                contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout),
            ):
                result = function(*args, **kwargs)
            if as_json:
                print(json.dumps(_plain(result)))
            if isinstance(result, Mapping) and (code := result.get("exit_code")):
                raise typer.Exit(code)

    _add_flags(command, function, flags)
    return command


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Prints bad input, a file that can't be used and a lack of memory as one line, and exits."""
    try:
        yield
    except (PolarjaxError, OSError, RuntimeError) as error:
        explained = _explained(error)
        if explained is None:
            raise
        print(f"polarjax: {explained}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from explained


def _explained(error: Exception) -> PolarjaxError | None:
    """What a user can do something about; None for what is no fault of theirs."""
    if isinstance(error, PolarjaxError):
        return error
    if isinstance(error, OSError):
        if error.filename is None:  # a broken pipe, for example
            return None
        hint = read_hint(error, "check that it exists and is readable")
        return PolarjaxError("this file can't be used", where=error.filename, got=error.strerror, hint=hint)
    if not ran_out(error):
        return None
    hint = "compute less at a time, or use a device with more memory; polarjax inspect shows the sizes"
    return PolarjaxError("the device ran out of memory", hint=hint)


_JSON = {
    "as_json": Annotated[
        bool,
        typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output."),
    ]
}
_CACHE = {
    "no_cache": Annotated[
        bool, typer.Option(OFF, help="Don't keep compiled programs in the user's cache folder.")
    ]
}
"""Options that verbs get in addition to their own."""


def _add_flags(command: Any, function: Callable[..., Any], flags: Mapping[str, Any]) -> None:
    """Gives `command` the signature of `function` plus flags, which default to False or None."""
    signature = inspect.signature(function)
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind.__origin__ is bool else None,
            annotation=kind,
        )
        for name, kind in flags.items()
    ]
    command.__signature__ = signature.replace(
        parameters=[*signature.parameters.values(), *added], return_annotation=None
    )
    command.__annotations__ = function.__annotations__ | dict(flags)


@contextlib.contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that unfinished output is removed."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def end(_signal: int, _frame: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _never_ignored() -> Iterator[None]:
    """Sends SIGINT and SIGTERM again if Python ignored their exception, as it does where one comes while the garbage
    collector calls JAX."""

    def again(ignored: Any) -> None:
        value = ignored.exc_value
        interrupted = isinstance(value, KeyboardInterrupt)
        if not interrupted and not (isinstance(value, SystemExit) and value.code == TERMINATED):
            before(ignored)
            return
        number = signal.SIGINT if interrupted else signal.SIGTERM
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()

    before, sys.unraisablehook = sys.unraisablehook, again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _plain(value: Any) -> Any:
    """The value for JSON: text for paths, lists for arrays, null for infinity and NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"a verb returned {type(value).__name__}, which JSON cannot hold")


if __name__ == "__main__":
    main()
