"""`polarjax export`: a model directory becomes a HuggingFace folder."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from checkpoints_convert import export_checkpoint
from polarjax.cli.inputs import bytes_of
from polarjax.progress import task


def export(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory.")],
    out: Annotated[Path, typer.Argument(metavar="HF_DIR", help="The HuggingFace folder to make.")],
    shard_gb: Annotated[float, typer.Option(help="Maximum gigabytes (10^9 bytes) per weights file.")] = 5.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a HuggingFace folder, an earlier export or not.")
    ] = False,
) -> dict[str, Any]:
    """Write a model directory as a HuggingFace folder with safetensors, bit for bit what was converted."""
    size = bytes_of(shard_gb, "--shard-gb")
    done = export_checkpoint(folder, out, shard_bytes=size, overwrite=overwrite, progress=task)
    print(
        f"{done.model_type}: {done.tensors} tensors, {done.num_bytes / 1e6:.1f} MB, {done.dtype}, "
        f"{done.seconds:.1f} s -> {done.path}"
    )
    return dataclasses.asdict(done)
