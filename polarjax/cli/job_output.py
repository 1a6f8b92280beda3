"""Where `polarjax generate --prompts` writes, and whether what is there may be continued or replaced."""

import contextlib
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polarjax.checkpoint.bundle import Bundle, needed_tokenizer
from polarjax.checkpoint.learned import ROUTERS, fingerprint_of_routers, plans_alone
from polarjax.checkpoint.manifest import read_manifest
from polarjax.cli.generate_options import GenerateOptions
from polarjax.engine.engine import Engine
from polarjax.errors import CheckpointError, InputError
from polarjax.generation.settings import GENERATION_CONFIG, GenerationSettings
from polarjax.jobs.line_requests import begins
from polarjax.model.layout import mesh_of
from polarjax.model.mesh_shape import MeshShape
from polarjax.model.parameters import parameters
from polarjax.storage.atomic import absolute
from polarjax.storage.fingerprint import fingerprint_of
from polarjax.storage.line_file import (
    LineFile,
    LineStream,
    check_record,
    is_record,
    is_stream,
    open_stream,
    record_path,
    target_of,
)
from polarjax.storage.record import digests, files
from polarjax.text.byte_lines import STDIN
from polarjax.text.prompt_files import ANSWERS, PromptFile, PromptLine, Survey

_PROMPTS = "prompts file"


def of(options: GenerateOptions) -> LineStream | Path | None:
    """A stream for the output, or the path of its file; None if texts are printed.

    Raises:
      InputError: the output is closed, would be mixed with another one, or is a stream and was to be resumed.
      CheckpointError: something is at the path that is not to be replaced, or is the file of prompts.
    """
    output = options.output
    if output is None or output == STDIN or is_stream(output):
        if options.resume:
            hint = "name a file with --output, or drop --resume"
            raise InputError("only a file can be resumed", where="--resume", got=output, hint=hint)
        if output is None:
            return None
        made = standard_output() if output == STDIN else None
        _check_other(options.prompts, output)
        return made or open_stream(output)
    path = target_of(output)
    _check_other(options.prompts, path)
    _check_free(path, options)
    return path


def standard_output() -> LineStream:
    """Standard output for lines; raises `InputError` if it is closed, or the result goes there as JSON."""
    if sys.stdout is None:
        hint = "name a file with --output"
        raise InputError("standard output is closed", where="--output", got=STDIN, hint=hint)
    if wants_json():
        hint = "name a file with --output, or drop --json"
        raise InputError("--output - and --json both need standard output", hint=hint)
    return LineStream.stdout()


def wants_json() -> bool:
    """Whether the result is printed as JSON, and what is printed otherwise goes to standard error."""
    return sys.stdout is sys.stderr


def _check_other(prompts: Any, output: Path) -> None:
    """Raises `CheckpointError` if the prompts would be overwritten, or would never end."""
    read = _status(prompts, 0)
    for each in (output, record_path(output)):
        written = _status(each, 1)
        if read is None or written is None or not stat.S_ISREG(read.st_mode):
            continue
        if os.path.samestat(read, written):
            hint = "choose another name for the output"
            raise CheckpointError("this is the file of the prompts", where=each, hint=hint)


def _status(path: Path, standard: int) -> os.stat_result | None:
    try:
        return os.fstat(standard) if path == STDIN else os.stat(path)
    except OSError:
        return None


def _check_free(path: Path, options: GenerateOptions) -> None:
    """Raises `CheckpointError` if the output can't be written, or is there and is neither resumed nor replaced."""
    if path.is_dir():
        hint = "choose another name for the file"
        raise CheckpointError("a directory is in the way", where=path, hint=hint)
    beside = record_path(path)
    if path.exists() and not options.overwrite and not options.resume:
        raise _exists(path)
    if os.path.lexists(beside) and not is_record(beside):
        hint = "choose another name for the output, or move this away"
        raise CheckpointError("the record of the output goes here", where=beside, hint=hint)
    _check_writable(path)
    if not options.resume:  # which goes on with the record that is there
        _check_writable(path.parent)


def _exists(path: Path) -> CheckpointError:
    go_on = "go on with --resume, " if is_record(record_path(path)) else ""
    hint = f"{go_on}replace it with --overwrite, or choose another name"
    return CheckpointError("the output already exists", where=path, hint=hint)


def _check_writable(path: Path) -> None:
    """Raises `CheckpointError` if a file, or the nearest folder around it that is there, can't be written."""
    place = next(each for each in (path, *path.parents) if each.exists())
    if not os.access(place, os.W_OK) or (place != path and not place.is_dir()):
        hint = "choose a writable folder"
        raise CheckpointError("cannot write here", where=place, hint=hint)


@contextlib.contextmanager
def opened(path: Path, record: dict[str, Any], options: GenerateOptions) -> Iterator[LineFile]:
    """The output, empty or as an interrupted run of the same job left it.

    Raises:
      CheckpointError: it was begun by another job, maybe just now, or can't be written.
    """
    with LineFile(path) as file:
        begun = path.stat().st_size > 0
        if begun and options.resume:
            check_record(path, record, may_be_unknown=(_PROMPTS, "slots"))
        elif begun and not options.overwrite:
            raise _exists(path)
        else:
            file.begin(record)
        yield file


def written(file: Any, lines: PromptFile) -> Iterator[tuple[PromptLine, str | None]]:
    """Takes the lines whose answers are in the output; yields each, and its error if it has one. Cuts a torn last line.

    Raises:
      CheckpointError: what is in the output isn't what these lines would have become.
    """
    for number, text in enumerate(file.lines(), 1):
        line = lines.take()
        found = _object(text)
        if line is None or not begins(line, found) or found.keys().isdisjoint(ANSWERS):
            raise CheckpointError(
                "the output is of other prompts",
                where=f"{file.path}, line {number}",
                got=text[:80],
                expected="no further line" if line is None else f"the answer to {line.name} of the prompts",
                hint="resume with the prompts it was begun with, or start over with --overwrite",
            )
        yield line, found.get("error")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def record(
    options: GenerateOptions,
    bundle: Bundle,
    settings: GenerationSettings,
    engine: Engine,
    survey: Survey | None,
    *,
    dense: bool,
    apart: bool,
    logprobs: bool,
) -> dict[str, Any]:
    """All that the output depends on, by name; the number of slots and the mesh, too, if lines run `apart` (see
    `InOrder`), maybe for log-probabilities (`logprobs`)."""
    tokenizer = needed_tokenizer(bundle, options.folder).folder
    names = [name for name in files(tokenizer) if name != GENERATION_CONFIG]
    sums = {name: each["sha256"] for name, each in digests(tokenizer, names).items()}
    about = ("num_return_sequences", "logprobs", "seed", "chat", "system")
    most, folder = options.max_new_tokens, absolute(options.folder)
    # As they are stored: on a mesh, their groups may be in another order.
    routers = None if dense or bundle.routers is None else bundle.routers
    plans = None if dense or bundle.plans is None else plans_alone(folder)
    return {
        _PROMPTS: None if survey is None else survey.checksum,
        "prompt": list(options.prompt or ()),
        "model": read_manifest(options.folder).get("fingerprint") or fingerprint_of(parameters(bundle.model)),
        "dtype": bundle.model.dtype.name,
        "tokenizer": _sum(sums),
        "routers": routers and (fingerprint_of_routers(folder / ROUTERS) or routers.fingerprint),
        "plans": plans and _sum(plans.to_json()),
        "head_density": None if dense else options.head_density,
        "capacity": engine.capacity,
        "slots": engine.slots if apart else None,
        "mesh": _mesh(mesh_of(bundle.model), whole=logprobs) if apart else None,
        **settings.to_json(),
        "max_new_tokens": settings.max_new_tokens if most is None else most,
        **{name: getattr(options, name) for name in about},
    }


def _mesh(mesh: MeshShape, *, whole: bool) -> str | None:
    """What of a mesh the answers depend on: into how many parts it divides the rows, each of which chooses neurons of
    its own; or the `whole` mesh, for the last digits of log-probabilities. None for one part, or one device."""
    if not whole:
        return f"data={mesh.data}" if mesh.data > 1 else None
    vocab = "" if "vocab" in mesh.divided else ",vocab=whole"
    text = f"data={mesh.data},model={mesh.model}{vocab}, attention by {mesh.attention}"
    return text if mesh.devices > 1 else None


def _sum(value: Any) -> str:
    """A checksum of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
