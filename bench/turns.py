"""Processes that compile side by side and measure one after the other, while none of them compiles or computes."""

import fcntl
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_POLL = 0.05  # seconds


class Turns:
    """One process's view of the group that it measures in.

    All members make the same number of measurements, or end earlier. A measurement begins when every member has one
    to make, and nobody leaves before the last of them is over.

    Args:
      folder: where each member's progress is kept, a file each.
      name: of this process.
      members: how many there are.
    """

    def __init__(self, folder: Path, name: str, members: int) -> None:
        self._folder, self._own, self._members = folder, _progress(folder, name), members
        self._passed = 0

    def __call__(self, measure: Callable[[], float]) -> float:
        """What `measure` returns, once it is this process's turn."""
        self._gather()
        with (self._folder / "turn.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = measure()
        self._gather()
        return found

    def _gather(self) -> None:
        """Waits until all members have come as far."""
        self._passed += 1
        _write(self._own, self._passed)
        while sum(_passed(path) >= self._passed for path in self._folder.glob("*.passed")) < self._members:
            time.sleep(_POLL)


def _progress(folder: Path, name: str) -> Path:
    """The file that says how far a member has come."""
    return folder / f"{name}.passed"


def _write(path: Path, passed: float) -> None:
    """In one piece, as others read it meanwhile."""
    new = path.with_suffix(".new")
    new.write_text(str(passed))
    new.replace(path)


def _passed(path: Path) -> float:
    return float(path.read_text())


class Job(NamedTuple):
    """A process: its name, the arguments after Python's, and the device memory that it takes, in bytes."""

    name: str
    words: tuple[str, ...]
    memory: float


def groups(jobs: Iterable[Job], room: float, most: int) -> Iterator[list[Job]]:
    """Jobs that run at the same time: at most so many, and no more than there is room for. Large ones come first, each
    with as many smaller ones as fit beside it."""
    left = sorted(jobs, key=lambda job: -job.memory)
    while left:
        group: list[Job] = []
        for job in list(left):
            if not group or (len(group) < most and sum(each.memory for each in group) + job.memory <= room):
                group.append(job)
                left.remove(job)
        yield group


def run(group: Sequence[Job]) -> None:
    """Runs a group; each process gets `--turns FOLDER NAME MEMBERS`. One that ends, however it ends, holds nobody up."""
    with tempfile.TemporaryDirectory() as folder:
        turns = lambda job: ("--turns", folder, job.name, str(len(group)))
        running = [(job, subprocess.Popen([sys.executable, *job.words, *turns(job)])) for job in group]
        while running:
            ended = [job for job, process in running if process.poll() is not None]
            for job in ended:
                _write(_progress(Path(folder), job.name), math.inf)
            running = [(job, process) for job, process in running if job not in ended]
            time.sleep(_POLL)
