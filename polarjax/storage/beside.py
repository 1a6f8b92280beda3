"""Work in a thread beside the caller's, with errors as if it had been done first."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


@contextlib.contextmanager
def beside[T](function: Callable[[], T]) -> Iterator[Future[T]]:
    """Runs a function in a thread while the block runs; the block ends only when both have ended.

    If both raise an `Exception`, the caller gets the function's. A long block can call `stop_if_failed` now and then, to
    end early.
    """
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(function)
        try:
            yield running
        except Exception:
            running.result()
            raise
        running.result()


def stop_if_failed(running: Future[Any]) -> None:
    """Raises the exception of a function that has ended with one."""
    if running.done():
        running.result()
