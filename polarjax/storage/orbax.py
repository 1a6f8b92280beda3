"""Options and workarounds for writing with orbax: errors and threads."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from orbax.checkpoint.experimental import v1 as ocp

from polarjax.errors import CheckpointError


def saving_context() -> ocp.Context:
    """How arrays are written: each a run of uncompressed bytes, without copying it on the host."""
    context = ocp.Context()
    context.array_options.saving.use_compression = False
    context.memory_options.deepcopy_host_arrays = False
    return context


@contextlib.contextmanager
def orbax_errors(what: str, folder: Path, hint: str | None = None) -> Iterator[None]:
    """Turns errors that orbax raises in the block into `CheckpointError(what)`, with their first line."""
    try:
        yield
    except (ValueError, KeyError, RuntimeError) as error:
        detail = next(iter(str(error).splitlines()), "")[:200]
        raise CheckpointError(what, where=folder, got=detail, hint=hint) from error


_STILL = 1.0  # seconds without a change after which a folder counts as idle


@contextlib.contextmanager
def settled(folder: Path) -> Iterator[None]:
    """After an error, waits until `folder` stops changing.

    When one file fails, TensorStore keeps writing the rest of the batch and can't be stopped: it would refill the folder
    during or after its removal.
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
    """Size of everything in `folder`; files may come and go meanwhile."""
    sizes = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                sizes[os.path.join(root, name)] = os.lstat(os.path.join(root, name)).st_size
    return sizes


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Hides errors that orbax logs in the block, and TensorStore's errors about a closed event loop.

    Also hides failures of writes that were still running when the first one failed, even after the block.
    """
    logging.getLogger("asyncio").addFilter(_is_not_late_write)  # logged at garbage collection; added once
    logger, shown = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda late: None if str(late.exc_value) == "Event loop is closed" else shown(late)
    try:
        yield
        sys.unraisablehook = shown
    finally:
        logger.setLevel(level)


def _is_not_late_write(record: logging.LogRecord) -> bool:
    """False for a failed write that nobody awaited because another one had failed first."""
    return not record.exc_info or "os_error_code=" not in str(record.exc_info[1])
