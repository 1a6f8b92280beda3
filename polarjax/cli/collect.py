"""`polarjax collect`: records a model's activations on text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from polarjax.cli import learning
from polarjax.cli.decoding_options import Mesh
from polarjax.cli.inputs import bytes_of
from polarjax.progress import tell
from polarjax.sparsity.options import CollectOptions


def collect(
    folder: learning.Folder,
    text: learning.Texts,
    to: Annotated[Path, typer.Option(help="The folder of activations to create.")],
    window: learning.Window = None,
    max_tokens: learning.MaxTokens = learning.MAX_TOKENS,
    max_gb: learning.MaxGb = learning.MAX_GB,
    fit: learning.Fit = False,
    validation: learning.Validation = learning.VALIDATION,
    test: learning.Test = learning.TEST,
    rank_by: learning.RankBy = None,
    skipped: learning.Skipped = None,
    published: learning.Published = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing activations.")] = False,
    dtype: learning.Dtype = None,
    mesh: Mesh = None,
) -> dict[str, Any]:
    """Record router inputs, active neurons and how important heads are, on text, for train-routers."""
    from polarjax.memory import memory_line
    from polarjax.sparsity.collection import record
    from polarjax.sparsity.footprint import collecting_batch

    max_bytes = bytes_of(max_gb, "--max-gb")
    heads = learning.head_options(rank_by, skipped, published)
    options = CollectOptions(held_out=(validation, test), max_bytes=max_bytes, fit=fit, **heads)
    bundle, windows = learning.load_and_cut(folder, text, window, max_tokens, dtype, mesh)
    recording = learning.announce(bundle, windows, options)
    size, needed = collecting_batch(bundle.model, windows.shape, recording, options.batch_size)
    tell(memory_line("collecting", needed))
    record(bundle.model, windows, recording, to, overwrite=overwrite, batch_size=size)
    print(f"Written to {to}. Next: polarjax train-routers {folder} --activations {to}")
    return {
        "activations": to,
        "windows": len(windows),
        "window": windows.shape[1],
        "tokens": len(recording.part),
        "tokens_offered": recording.offered,
        "bytes": recording.num_bytes,
    }
