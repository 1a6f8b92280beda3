"""Silence for what orbax's threads print about a failed write that is raised anyway."""

import contextlib
import logging
import sys
from collections.abc import Iterator


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
