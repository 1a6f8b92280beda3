"""A HuggingFace folder -> a model directory, one tensor at a time."""

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.hf_config import CONFIG, read_config
from checkpoints_convert.hub import locate
from checkpoints_convert.json_files import read_json
from checkpoints_convert.rules import ConversionPlan, Family, Layout, Step, make_plan
from checkpoints_convert.tensor_names import some
from checkpoints_convert.weights_io import Tensor, open_weights, read_rows, unused_weights
from polarjax.checkpoint.manifest import SOURCE_CONFIG
from polarjax.checkpoint.writer import ModelWriter, new_model
from polarjax.configs import ModelConfig
from polarjax.errors import CheckpointError
from polarjax.numeric import check_flags
from polarjax.storage.atomic import absolute, write_json
from polarjax.storage.beside import beside, stop_if_failed
from polarjax.storage.dtypes import check_dtype
from polarjax.types import DTypeLike
from polarjax.types import Path as PathLike

type Progress = Callable[[str, int, str], AbstractContextManager[Callable[..., None]]]

_MB = 1_000_000
_BLOCK = 1 << 18  # elements checked at once; the buffer stays in cache


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      path: the model directory.
      model_type: the HuggingFace family.
      config: the model's configuration.
      dtype: the parameters' dtype.
      tensors: how many source tensors became parameters.
      num_bytes: their size in the source.
      skipped: source tensors that the model does not need, most because they can be computed.
      copied: names of the tokenizer and generation files copied.
      notes: what was fixed or left out, one line each.
      seconds: how long it took.
    """

    path: Path
    model_type: str
    config: ModelConfig
    dtype: str
    tensors: int
    num_bytes: int
    skipped: tuple[str, ...]
    copied: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float


def convert_checkpoint(
    src: PathLike,
    out: PathLike,
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Converts a HuggingFace checkpoint; `out` appears complete or not at all.

    Holds about twice the largest tensor in memory. Nothing in the source is executed or changed.

    Args:
      src: folder with config.json and weights (safetensors, or .bin files, which need torch; a single file or
        shards with their index), or the id of a model on the HuggingFace hub.
      out: the model directory to make.
      revision: branch, tag or commit of a model on the hub.
      dtype: float32, float16 or bfloat16 for all parameters; None keeps the source's dtype and bits.
      overwrite: whether an existing model directory is replaced.
      allow_nonfinite: whether NaN and infinity are accepted.
      progress: called with a description, a total and its unit; `polarjax.progress.task` is one.

    Raises:
      InputError: an argument has a value that it can't have.
      CheckpointError: the source is incomplete or damaged, does not fit its config, or `out` cannot be written.
      UnsupportedConfigError: polarjax doesn't support what config.json asks for.
    """
    started = time.monotonic()
    check_flags("convert_checkpoint", overwrite=overwrite, allow_nonfinite=allow_nonfinite)
    chosen = None if dtype is None else check_dtype(dtype)
    source, target = locate(src, revision=revision), absolute(out)
    family, config, notes, named = read_config(source)
    check_disjoint(source, target)
    tensors = open_weights(source, named)
    config, plan, more = _plan(family, config, tensors, source)
    notes = (*notes, *_weights_note(source, named), *more)
    used = [tensors[step.source] for step in plan.steps]
    wanted = parameter_dtype(chosen, used, source)
    largest = max(tensor.num_bytes for tensor in used)
    options = {"num_bytes": sum(tensor.size * wanted.itemsize for tensor in used), "overwrite": overwrite}
    with new_model(target, config, model_type=family.model_type, largest=largest, **options) as writer:
        source_config = read_json(source / CONFIG, last_wins=True)
        write_json(writer.folder / SOURCE_CONFIG, source_config)
        copy = functools.partial(writer.copy_tokenizer, source, source_config)
        options = {"dtype": wanted, "finite": not allow_nonfinite, "progress": progress}
        copied, more = _write(plan.steps, tensors, writer, copy, **options)
    return Conversion(
        path=target,
        model_type=family.model_type,
        config=config,
        dtype=wanted.name,
        tensors=len(used),
        num_bytes=sum(tensor.num_bytes for tensor in used),
        skipped=plan.skipped + plan.left_out + tuple(head for head, _ in plan.equal),
        copied=copied,
        notes=(*_code_note(source_config), *notes, *more),
        seconds=time.monotonic() - started,
    )


def check_disjoint(source: Path, target: Path) -> None:
    """Raises `CheckpointError` if one of two folders is inside the other, after resolving links."""
    inner, outer = target.resolve(), source.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        hint = "choose an output outside the source"
        raise CheckpointError(
            "the output and the source contain one another", where=target, got=source, hint=hint
        )


def parameter_dtype(dtype: np.dtype | None, tensors: Sequence[Tensor], where: Path) -> np.dtype:
    """The dtype to store parameters in: `dtype`, or the one that all tensors share."""
    if dtype is not None:
        return dtype
    found = Counter(tensor.dtype for tensor in tensors)
    if len(found) > 1:
        got = ", ".join(f"{count} of {kind.name}" for kind, count in found.most_common())
        hint = "choose one for all parameters: dtype (--dtype), for example bfloat16"
        raise CheckpointError("the tensors have several dtypes", where=where, got=got, hint=hint)
    return tensors[0].dtype


def _plan(
    family: Family, config: ModelConfig, tensors: Mapping[str, Tensor], source: Path
) -> tuple[ModelConfig, ConversionPlan, tuple[str, ...]]:
    """The config, plan and notes. As in transformers, tied tensors that differ are untied."""
    shapes = {name: each.shape for name, each in tensors.items()}
    plan = make_plan(family, config, shapes, where=source)
    notes = (f"left out, because the language model does not need it: {some(plan.left_out)}",)
    notes = notes if plan.left_out else ()
    if all(_same(tensors[head], tensors[table]) for head, table in plan.equal):
        return config, plan, notes
    config = dataclasses.replace(config, tie_embeddings=False)
    note = f"{CONFIG} ties the head to the embeddings, but the two tensors differ: both are kept"
    return config, make_plan(family, config, shapes, where=source), (*notes, note)


def _code_note(config: Mapping[str, Any]) -> tuple[str, ...]:
    own = "auto_map" in config
    return (f"{CONFIG} asks for its own code (auto_map), which is never run",) if own else ()


def _weights_note(source: Path, named: str | None) -> tuple[str, ...]:
    name, others = unused_weights(source, named)
    if not others:
        return ()
    return (f"the weights of {name} are read, as in transformers; not read: {', '.join(others)}",)


def _same(one: Tensor, two: Tensor, block: int = 1 << 24) -> bool:
    if (one.shape, one.kind) != (two.shape, two.kind):
        return False
    if one.strides or two.strides:
        return np.array_equal(one.read().view(np.uint8), two.read().view(np.uint8))
    with open(one.file, "rb") as first, open(two.file, "rb") as second:
        first.seek(one.offset)
        second.seek(two.offset)
        sizes = [block] * (one.num_bytes // block) + [one.num_bytes % block]
        return all(first.read(size) == second.read(size) for size in sizes)


def _write[T](
    steps: Sequence[Step],
    tensors: Mapping[str, Tensor],
    writer: ModelWriter,
    copy_tokenizer: Callable[[], T],
    *,
    dtype: np.dtype,
    finite: bool,
    progress: Progress | None,
) -> T:
    """Converts the tensors while a thread copies the tokenizer; returns what `copy_tokenizer` does."""
    total = sum(tensors[step.source].num_bytes for step in steps)
    with beside(copy_tokenizer) as copied, counter(progress, total, "converting") as report:
        advance = lambda size: (stop_if_failed(copied), report(size))
        _transfer(steps, tensors, writer, dtype=dtype, finite=finite, advance=advance)
    return copied.result()


def _transfer(
    steps: Sequence[Step],
    tensors: Mapping[str, Tensor],
    writer: ModelWriter,
    *,
    dtype: np.dtype,
    finite: bool,
    advance: Callable[[int], object],
) -> None:
    """Converts the tensors in their order on disk; after a bad one, only checks the rest."""
    bad: list[str] = []
    steps = sorted(steps, key=lambda step: (tensors[step.source].file, tensors[step.source].offset))
    with contextlib.closing(read_rows([tensors[step.source] for step in steps])) as rows:
        for step in steps:
            tensor = tensors[step.source]
            array = writer.reserve(tensor.size * dtype.itemsize).view(dtype)
            if not _fill(array, step.layout, rows, count=tensor.matrix[0], finite=finite):
                bad.append(step.source)
            if not bad:
                writer.add(step.target, array.reshape(step.shape))
            advance(tensor.num_bytes)
    if bad:
        raise CheckpointError(
            f"{len(bad)} {'tensor holds' if len(bad) == 1 else 'tensors hold'} NaN or infinity as {dtype.name}",
            where=tensors[bad[0]].file.parent,
            got=some(bad),
            hint="use an undamaged checkpoint or a wider dtype, or pass allow_nonfinite (--allow-nonfinite)",
        )


def _fill(array: np.ndarray, layout: Layout, rows: Iterator[np.ndarray], *, count: int, finite: bool) -> bool:
    """Copies the next `count` rows into a parameter. False if `finite` is set and a value is NaN or infinite."""
    done, good = 0, True
    while done < count:
        part = _cast(next(rows), array.dtype)
        good = good and (not finite or all_finite(part))
        layout.place(part, done, array)
        done += len(part)
    return good


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # overflow gives infinity, which the caller finds
        return array.astype(dtype, copy=False)


def all_finite(array: np.ndarray) -> bool:
    """Whether every element of a float array is finite; checks the bits, in blocks."""
    infinity = np.array(np.inf, array.dtype).view(f"u{array.itemsize}")[()]
    magnitude = infinity.dtype.type(np.iinfo(infinity.dtype).max >> 1)  # all bits but the sign
    bits = array.reshape(-1).view(infinity.dtype)
    return all((bits[i : i + _BLOCK] & magnitude).max() < infinity for i in range(0, bits.size, _BLOCK))


@contextlib.contextmanager
def counter(progress: Progress | None, total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Reports bytes done, in whole megabytes, with the rate."""
    if progress is None:
        yield lambda size: None
        return
    with progress(description, -(-total // _MB), "MB") as report:
        done, started = 0, time.monotonic()

        def advance(size: int) -> None:
            nonlocal done
            before, done = -(-done // _MB), done + size
            rate = done / _MB / max(time.monotonic() - started, 1e-9)
            report(-(-done // _MB) - before, note=f"{rate:.0f} MB/s")

        yield advance
