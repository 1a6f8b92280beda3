"""Progress of long tasks: a bar on a terminal; elsewhere a line every few seconds, if enabled.

Only process 0 of a multi-process run writes, always to standard error. The command line enables lines; the library
never does by itself.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

LINE_INTERVAL = 5.0  # seconds between lines when there is no terminal

_lines: ContextVar[bool] = ContextVar("polarjax_progress_lines", default=False)


@contextlib.contextmanager
def show_lines(enabled: bool = True) -> Iterator[None]:
    """Within this context, progress prints a line every few seconds when there is no terminal."""
    token = _lines.set(enabled)
    try:
        yield
    finally:
        _lines.reset(token)


@contextlib.contextmanager
def task(description: str, total: int | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
    """Reports the progress of one long task.

    Args:
      description: what is being done, in a few words.
      total: number of steps; None if unknown.
      unit: what is counted, in the plural ("tokens", "steps").

    Yields:
      `advance(steps=1, note="")`: counts finished steps; the note (a loss, a file name) is shown next to the count.
    """
    if not _is_first_process():
        yield _ignore
    elif sys.stderr.isatty():
        with _bar() as bar:
            row = bar.add_task(description, total=total, unit=unit, note="")
            yield lambda steps=1, note="": bar.update(row, advance=steps, note=note)
    elif _lines.get():
        reporter = _Lines(description, total, unit)
        yield reporter.advance
        reporter.close()
    else:
        yield _ignore


def tell(line: str) -> None:
    """Prints a line about what comes next, wherever progress would be shown."""
    if _is_first_process() and (_lines.get() or sys.stderr.isatty()):
        print(line, file=sys.stderr, flush=True)


@dataclass
class _Lines:
    description: str
    total: int | None
    unit: str
    done: int = 0
    note: str = ""
    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    printed: int = -1
    first: tuple[float, int] | None = (
        None  # time and count of the first report, which compilation may have delayed
    )

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.first = self.first or (time.monotonic(), self.done)
        self.note = note or self.note
        if time.monotonic() - self.last >= LINE_INTERVAL:
            self.last = time.monotonic()
            self._print()

    def close(self) -> None:
        if self.printed != self.done:
            self._print()

    def _print(self) -> None:
        self.printed = self.done
        count = f"{self.done}/{self.total}" if self.total is not None else f"{self.done}"
        parts = [
            f"{self.description}: {count} {self.unit}".rstrip(),
            f"{time.monotonic() - self.started:.0f} s",
        ]
        print(
            ", ".join(part for part in [*parts, self._left(), self.note] if part), file=sys.stderr, flush=True
        )

    def _left(self) -> str:
        """How long the rest will take at the rate so far; empty if that isn't known."""
        since, done = self.first or (0.0, self.done)
        if self.total is None or not done < self.done < self.total:
            return ""
        seconds = (time.monotonic() - since) / (self.done - done) * (self.total - self.done)
        return f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """A length of time for people, as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _is_first_process() -> bool:
    """True for process 0. Until JAX is imported, there is only one process."""
    jax = sys.modules.get("jax")
    return jax is None or jax.process_index() == 0


def _bar() -> Any:
    from rich import progress as rich_progress
    from rich.console import Console

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[unit]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def _ignore(steps: int = 1, note: str = "") -> None:
    del steps, note
