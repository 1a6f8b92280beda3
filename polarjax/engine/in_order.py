"""Runs tasks of one request or more on an engine; the results come in the order of the tasks, in bounded memory."""

import array
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from polarjax.engine.engine import Engine
from polarjax.engine.requests import Event, Finished
from polarjax.errors import PolarjaxError
from polarjax.generation.logprobs import LogProbs

HELD_BYTES = 1 << 26
"""Bytes of tasks and their results that may wait for an earlier one before no further task is begun."""


def most_held(slots: int) -> int:
    """Tasks that may be begun before the first of them has ended: the others go on beside one that is so much longer."""
    return max(256, 32 * slots)


@dataclasses.dataclass(eq=False)
class Answer:
    """What a request has become so far: token ids, text, why it ended, and log-probabilities if they were asked for."""

    tokens: array.array = dataclasses.field(default_factory=lambda: array.array("i"))
    text: str = ""
    finished: Finished | None = None
    logprobs: list[LogProbs] = dataclasses.field(default_factory=list)

    def add(self, event: Event) -> int:
        """Takes what is new; returns about how many bytes that is."""
        self.tokens.extend(event.tokens)
        self.text += event.text
        self.finished = event.finished
        if event.logprobs is None:
            return 4 * len(event.tokens) + len(event.text)
        self.logprobs.append(event.logprobs)
        return (8 + 8 * event.logprobs.ids.shape[-1]) * len(event.tokens) + len(event.text)


@dataclasses.dataclass(eq=False)
class Task:
    """Requests that differ only in their seeds.

    Attributes:
      source: whatever the task comes from.
      options: arguments of `Engine.submit`, without the seed.
      seeds: the seed of each request; one that is refused ends the task.
      error: why there are no requests.
      size: about how many bytes the source and the answers so far are.
      answers: of the requests so far.
    """

    source: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Iterator[int] = dataclasses.field(default_factory=lambda: iter(()))
    error: PolarjaxError | None = None
    size: int = 0
    answers: list[Answer] = dataclasses.field(default_factory=list)
    begun: bool = False  # whether all of its requests are submitted

    @property
    def done(self) -> bool:
        """Whether all of its requests have ended."""
        return self.begun and all(each.finished for each in self.answers)


class InOrder(Iterator[Task]):
    """Yields tasks in their order, each as soon as it and all before it are done.

    At most 2 B requests are in the engine, and at most `most_held(B)` tasks are between `take` and the result.

    Rounding depends on what runs together; tokens do too if neurons are chosen for all rows together. With `apart`, so
    many tasks run without those before and after them, as on a new engine.

    Args:
      engine: of B slots; nobody else uses it.
      take: the next task; None if there is none, or, if it is called with False, if it would have to be waited for.
      watch: called with every event.
      apart: number of tasks that run together; None lets all mix.

    Attributes:
      finished: tasks that are done, yielded or not.
      in_use: slots that had a request when the device got its latest work.
    """

    def __init__(
        self,
        engine: Engine,
        take: Callable[[bool], Task | None],
        watch: Callable[[Event], None],
        apart: int | None = None,
    ) -> None:
        self._engine, self._take, self._watch, self._apart = engine, take, watch, apart
        self._held: deque[Task] = deque()
        self._requests: dict[int, tuple[Task, Answer]] = {}
        self._partial: Task | None = None
        self._taken = 0
        self._size, self.finished, self.in_use = 0, 0, 0

    def __next__(self) -> Task:
        """The next task that is done; waits for the device if need be."""
        while True:
            self._fill()
            if not self._held:
                raise StopIteration
            if self._held[0].done:
                task = self._held.popleft()
                self._size -= task.size
                return task
            self.in_use = min(len(self._requests), self._engine.slots)
            event = next(self._engine, None)
            if event is None:
                raise RuntimeError("the engine has ended before its requests")
            self._handle(event)

    def _fill(self) -> None:
        """Submits requests until every slot has one and another is waiting for it."""
        while self._engine.waiting < self._engine.slots:
            if self._partial is None and not self._begin():
                return
            if (task := self._partial) is not None:
                self._submit(task)

    def _begin(self) -> bool:
        """Takes another task; False if there is none yet, or no room."""
        if len(self._held) >= most_held(self._engine.slots) or self._size >= HELD_BYTES:
            return False
        if self._apart and self._taken % self._apart == 0:
            if self._requests:
                return False
            self._engine.reset()
        task = self._take(not self._held)
        if task is None:
            return False
        self._taken += 1
        self._held.append(task)
        self._size += task.size
        self._partial = task
        return True

    def _submit(self, task: Task) -> None:
        """Submits the task's next request, or finds that there is none."""
        seed = next(task.seeds, None) if task.error is None else None
        if seed is not None:
            try:
                number = self._engine.submit(**task.options, seed=seed)
            except PolarjaxError as error:
                task.error = error
            else:
                task.answers.append(Answer())
                self._requests[number] = task, task.answers[-1]
                return
        task.begun, self._partial = True, None
        self.finished += task.done

    def _handle(self, event: Event) -> None:
        task, answer = self._requests[event.request]
        size = answer.add(event)
        task.size += size
        self._size += size
        if event.finished:
            del self._requests[event.request]
            self.finished += task.done
        self._watch(event)
