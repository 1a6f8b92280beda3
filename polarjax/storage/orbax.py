"""Orbax and TensorStore as this project needs them: their options, errors, paths and threads."""

import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from orbax.checkpoint.experimental import v1 as ocp

from polarjax.errors import CheckpointError, ran_out

CHUNK_BYTES = 1 << 26  # the unit in which a shard of a large array can be read back


def saving_context() -> ocp.Context:
    """How arrays are written: uncompressed, in chunks of `CHUNK_BYTES`, without a copy of them on the host."""
    context = ocp.Context()
    context.array_options.saving.use_compression = False
    context.array_options.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.memory_options.deepcopy_host_arrays = False
    return context


@contextlib.contextmanager
def orbax_errors(what: str, folder: Path, hint: str | None = None) -> Iterator[None]:
    """Raises `CheckpointError(what)` in the place of what orbax raises in the block, with its first line."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        detail = next(iter(str(error).splitlines()), "")[:200]
        if ran_out(error):
            what, hint = (
                "the device has too little memory for the arrays",
                "see polarjax inspect for their size",
            )
        raise CheckpointError(what, where=folder, got=detail, hint=hint) from error


_STILL = 1.0  # seconds without a change after which a folder counts as left alone


@contextlib.contextmanager
def settled(folder: Path) -> Iterator[None]:
    """After an error, waits until nothing in `folder` changes any more.

    When one file fails, TensorStore goes on with the others of the batch, out of reach: it would fill the folder again
    while, or after, it is removed.
    """
    try:
        yield
    except BaseException:
        seen, since = None, time.monotonic()
        while time.monotonic() - since < _STILL:
            if (found := _sizes(folder)) != seen:
                seen, since = found, time.monotonic()
            time.sleep(_STILL / 50)
        raise


def _sizes(folder: Path) -> dict[str, int]:
    """What lies in `folder` at the moment, and of which size; files may come and go meanwhile."""
    sizes = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                sizes[os.path.join(root, name)] = os.lstat(os.path.join(root, name)).st_size
    return sizes


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[str]:
    """`folder` by a name that can be given to orbax, for which paths are glob patterns, and to TensorStore, for which a
    backslash parts folders.
    """
    if not set("*?[\\") & set(str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, "link")
        link.symlink_to(folder.parent, target_is_directory=True)
        yield str(link / folder.name)


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """In the block, errors that orbax logs are not shown, nor tensorstore's about an event loop that is closed.

    Writes that were under way come to an end after one has failed: of them nothing is shown after the block either.
    """
    logging.getLogger("asyncio").addFilter(_is_of_no_write)  # told whenever Python tidies up; added once
    logger, shown = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda late: None if str(late.exc_value) == "Event loop is closed" else shown(late)
    try:
        yield
        sys.unraisablehook = shown
    finally:
        logger.setLevel(level)


def _is_of_no_write(record: logging.LogRecord) -> bool:
    """False for the failure of a write that nobody waited for, because another had failed before."""
    return record.exc_info is None or "os_error_code=" not in str(record.exc_info[1])
