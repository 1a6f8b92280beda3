"""Commands that each make a file: one after the other or side by side, within a limit of time, each only once."""

import dataclasses
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import append_jsonl, commit, read_jsonl

ENOUGH = 15  # seconds: with fewer left no step begins
GRACE = 25  # seconds for a step that is stopped to keep what it has
RECORD = "steps.jsonl"
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command and the file that says that it is done.

    Attributes:
      name: its name in messages, in the record and among the logs.
      command: the words after `python -m`.
      output: the file.
      needs: files without which it can't run, each with a hint.
      options: the words of the command that say how it is done, for the record.
      prints: whether the command's standard output becomes `output`.
      partial: the folder of `output`, if the command makes it; what is left of an interrupted call is removed first.
      state: a folder from which an interrupted call continues, with `--resume`.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    needs: tuple[tuple[Path, str], ...] = ()
    options: tuple[str, ...] = ()
    prints: bool = False
    partial: Path | None = None
    state: Path | None = None

    @property
    def words(self) -> list[str]:
        """The whole command, as it would be run now."""
        resumes = self.state is not None and self.state.exists()
        return [sys.executable, "-m", *self.command, *(["--resume"] if resumes else [])]


def run_chains(
    chains: Sequence[Sequence[Step]], work: Path, *, limit: float | None = None, jobs: int = 1
) -> bool:
    """Runs `jobs` chains at a time, and the steps of each in order; whether all outputs are there.

    A step that fails or can't run doesn't keep the others from running. After `limit` seconds no step begins, and those
    that run are told to end.
    """
    jobs = max(1, min(jobs, len(chains)))
    ends = math.inf if limit is None else time.monotonic() + limit
    run = _Run(work, ends, {MEMORY: f"{0.9 / jobs:.2f}", **os.environ}, threading.Event())
    each = lambda chain: [_done(step, run) for step in chain]
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return all(done for chain in list(pool.map(each, chains)) for done in chain)
        except BaseException:
            run.stopped.set()
            raise


class _Run(NamedTuple):
    work: Path
    ends: float
    environment: Mapping[str, str]
    stopped: threading.Event


def _done(step: Step, run: _Run) -> bool:
    """Runs the step, unless its output is there; says in one line what became of it, and whether the output is there."""
    left = run.ends - time.monotonic()
    missing = [f"{path} is missing ({hint})" for path, hint in step.needs if not path.exists()]
    if step.output.exists():
        told = "there already"
    elif missing:
        told = f"left out: {missing[0]}"
    elif left < ENOUGH or run.stopped.is_set():
        told = "not begun: the time is up"
    else:
        told = _tried(step, run)
    print(f"{step.name}: {told}", flush=True)
    return step.output.exists()


def _tried(step: Step, run: _Run) -> str:
    log = run.work / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    step.output.parent.mkdir(parents=True, exist_ok=True)
    if step.partial is not None:
        shutil.rmtree(step.partial, ignore_errors=True)
    began = time.monotonic()
    code = _exit_code(step.words, log, run)
    seconds = time.monotonic() - began
    printed = log.with_suffix(".out")
    if code == 0 and step.prints:
        shutil.copyfile(printed, step.output.with_suffix(".part"))
        step.output.with_suffix(".part").rename(step.output)
    row = {"step": step.name, "exit_code": code, "seconds": round(seconds, 1), "options": list(step.options)}
    append_jsonl(run.work / RECORD, [row], {"commit": commit()})
    if code == 0 and step.output.exists():
        return f"{seconds:.0f} s"
    up = time.monotonic() >= run.ends or run.stopped.is_set()
    ended = "ended, because the time is up," if up else f"failed with exit code {code}"
    return f"{ended} after {seconds:.0f} s: {_last_line(log)}"


def _exit_code(words: list[str], log: Path, run: _Run) -> int:
    """That of the command, which gets SIGTERM when the time is up, and is killed if that doesn't help."""
    with (
        log.open("wb") as errors,
        log.with_suffix(".out").open("wb") as out,
        subprocess.Popen(
            words, stdout=out, stderr=errors, stdin=subprocess.DEVNULL, env=run.environment
        ) as ran,
    ):
        while ran.poll() is None and time.monotonic() < run.ends and not run.stopped.is_set():
            run.stopped.wait(0.1)
        if ran.poll() is None:
            ran.terminate()
            try:
                return ran.wait(GRACE)
            except subprocess.TimeoutExpired:
                ran.kill()
        return ran.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), f"see {log}")


def recorded(work: Path) -> dict[str, dict[str, Any]]:
    """The last successful call of each step by name: its commit, seconds and options."""
    rows = read_jsonl(work / RECORD) if (work / RECORD).exists() else []
    return {row["step"]: row for row in rows if row["exit_code"] == 0}
