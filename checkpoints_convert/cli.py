"""`polarjax convert`: a HuggingFace checkpoint becomes a model directory."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from checkpoints_convert.convert import convert_checkpoint, summary
from polarjax.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


def convert(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A HuggingFace folder with safetensors.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model directory to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing model directory.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Let NaN weights through.")
    ] = False,
) -> dict[str, Any]:
    """Turn a HuggingFace checkpoint (OPT or LLaMA) into a model directory."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError("unknown dtype", where="--dtype", got=repr(dtype), expected=" or ".join(DTYPES))
    start = time.perf_counter()
    done = convert_checkpoint(source, out, dtype=dtype, overwrite=overwrite, allow_nonfinite=allow_nonfinite)
    seconds = time.perf_counter() - start
    print(
        f"{done.model_type}: {done.tensors} tensors, {done.num_bytes / 1e6:.1f} MB in {seconds:.1f} s"
        f"{'' if done.tokenizer else ', no tokenizer'} -> {done.path}"
    )
    return {**summary(done), "seconds": seconds}
