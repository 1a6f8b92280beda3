"""`--coordinator`: a verb as one of several processes that decode together. Process 0 alone prints and writes."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polarjax.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FLAGS = {
    "coordinator": Annotated[
        str | None,
        typer.Option(
            help="Run as one of several processes: HOST:PORT where process 0 listens, or auto: see --processes."
        ),
    ],
    "processes": Annotated[
        int | None,
        typer.Option(
            help="With --coordinator: how many there are; auto: from SLURM, Open MPI, Kubernetes or torchrun."
        ),
    ],
    "process_id": Annotated[
        int | None, typer.Option(help="With --coordinator: the number of this process, from 0.")
    ],
}
"""Options of verbs that can run as several processes."""

INTERRUPTED = 128 + signal.SIGINT  # the exit code that shells use

_INPUTS = ("folder", "prompts", "text", "static_text")
"""Paths, which may differ; what is there is compared when it is read."""

_OUTPUTS = ("output", "overwrite", "resume", "report", "picture")
"""What process 0 alone writes, and how."""


@contextlib.contextmanager
def joined(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> Iterator[bool]:
    """Joins the other processes, if there are any; yields whether this one prints and writes.

    An error or an interruption in the block ends the others too, with a line that names this process.
    """
    if coordinator is None:
        for name, value in (("--processes", processes), ("--process-id", process_id)):
            if value is not None:
                raise InputError(f"{name} is for --coordinator", hint="give --coordinator HOST:PORT too")
        yield True
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before JAX is loaded: fewer lines of its own
    from polarjax.distributed.start import end_all, group, initialize

    initialize(coordinator, processes, process_id)
    try:
        with _voice() as speaks:
            yield speaks
    except typer.Exit as error:
        if (cause := error.__cause__) is not None:
            if (made := group()) is not None and made.process_id:  # process 0 has said it
                made.await_news()
                print(f"polarjax: {cause}", file=sys.stderr)
            end_all(str(cause), error.exit_code)
        raise
    except (KeyboardInterrupt, SystemExit) as error:
        code = error.code if isinstance(error, SystemExit) else INTERRUPTED
        end_all("it was interrupted", code if isinstance(code, int) else 1)
        raise


@contextlib.contextmanager
def _voice() -> Iterator[bool]:
    """Yields whether this is process 0. Others are silent; on process 0, what libraries print isn't taken for output."""
    from polarjax.distributed.start import group

    made = group()
    sys.stdout.flush()
    with open(os.dup(1), "w", encoding="utf-8", errors="backslashreplace") as out:
        os.dup2(2, 1)  # where libraries print
        if made is None or not made.process_id:
            with contextlib.redirect_stdout(out):
                yield True
            return
    with (
        open(os.devnull, "w") as out,
        open(os.devnull, "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        yield False


def agreed[T: "DataclassInstance"](options: T) -> T:
    """The options as this process takes them: only process 0 writes.

    Raises:
      InputError: the processes have different options.
    """
    from polarjax.distributed.start import group

    made = group()
    if made is None:
        return options
    if getattr(options, "mesh", "") is None:
        hint = "give --mesh too, of the devices of all processes, such as --mesh data=1,model=16"
        raise InputError("several processes share a model on a mesh", where="--coordinator", hint=hint)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    compared = {name: str(each) for name, each in given.items() if name not in _INPUTS + _OUTPUTS}
    options_of = {f"--{name.replace('_', '-')}": each for name, each in compared.items()}
    made.agree(options_of, hint="give every process the same options")
    if not made.process_id:
        return options
    silent: dict[str, Any] = {name: None for name in given if name in _OUTPUTS}
    silent |= {name: False for name in silent if isinstance(given[name], bool)}
    if given.get("prompts") is not None and given["output"] is not None:
        silent["output"] = Path(os.devnull)
    return dataclasses.replace(options, **silent)


def agree_on_texts(sums: Mapping[str, Any]) -> None:
    """Raises `InputError` unless all processes have read the same, by checksums."""
    from polarjax.distributed.start import group

    if (made := group()) is not None:
        made.agree(sums, hint="give every process copies of the same files")


def agree_on_prompts(checksum: str | None) -> None:
    """Raises `InputError` unless all processes read the same prompts, from files, which have a checksum."""
    from polarjax.distributed.start import group

    if checksum is None and group() is not None:
        hint = "write the prompts into a file that every process can read"
        raise InputError("several processes can't read one pipe", where="--prompts", hint=hint)
    agree_on_texts({"their prompts": checksum})
