"""`polarjax convert`: a HuggingFace checkpoint becomes a model directory."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from checkpoints_convert import Conversion, convert_checkpoint, describe_checkpoint
from polarjax.cli import inspect
from polarjax.progress import task
from polarjax.storage.dtypes import check_dtype
from polarjax.types import DTYPES


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A HuggingFace folder, or an id on the hub (org/name).")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model directory to make.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Dtype of the parameters: {', '.join(DTYPES)}; keep: as in the source.")
    ] = "keep",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing model directory.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinite weights.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be read, as inspect does; write nothing.")
    ] = False,
) -> dict[str, Any]:
    """Turn a HuggingFace checkpoint into a model directory."""
    chosen = None if dtype == "keep" else check_dtype(dtype, where="--dtype").name
    if dry_run:
        return inspect.dry_run(describe_checkpoint(source, revision=revision, dtype=chosen), chosen)
    done = convert_checkpoint(
        source,
        out,
        revision=revision,
        dtype=chosen,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        progress=task,
    )
    for note in done.notes:
        print(note)
    print(_summary(done))
    return {**dataclasses.asdict(done), "config": done.config.to_json()}


def _summary(done: Conversion) -> str:
    skipped = f" ({len(done.skipped)} more not needed)" if done.skipped else ""
    tokenizer = (
        "" if any("tokenizer" in name or "vocab" in name for name in done.copied) else ", no tokenizer"
    )
    return (
        f"{done.model_type}: {done.tensors} tensors{skipped}, {done.num_bytes / 1e6:.1f} MB, {done.dtype}"
        f"{tokenizer}, {done.seconds:.1f} s -> {done.path}"
    )
