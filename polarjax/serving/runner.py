"""One thread that iterates over an engine, and hands each event to the request that waits for it."""

import dataclasses
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polarjax.engine.engine import Engine
from polarjax.engine.requests import Event
from polarjax.errors import PolarjaxError
from polarjax.numeric import shown
from polarjax.serving.errors import ApiError
from polarjax.serving.metrics import Metrics

LONGEST_RETRY = 60

type Deliver = Callable[[int, Event | ApiError], None]
"""Called in the engine's thread with the index of a sequence and its event, or why there will be no more."""


@dataclasses.dataclass
class _Client:
    index: int
    deliver: Deliver
    arrived: float
    began: bool = False


class Runner:
    """Runs an engine in a thread of its own.

    Args:
      engine: which nobody else iterates.
      most_waiting: most sequences that may wait for a slot.
      metrics: counts what passes through.

    Attributes:
      failure: why the engine ended, in one line; None while it works.
    """

    def __init__(self, engine: Engine, *, most_waiting: int, metrics: Metrics) -> None:
        self.engine, self._metrics = engine, metrics
        self.failure: str | None = None
        self.most = engine.slots + most_waiting
        self._clients: dict[int, _Client] = {}
        self._open = 0  # sequences that were admitted and haven't ended
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="polarjax-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancels what is left, ends the thread and closes the engine."""
        with self._lock:
            self._stopping = True
            left = list(self._clients)
        self.cancel(left)
        self._work.set()
        self._thread.join()
        self.engine.close()

    def check_size(self, count: int) -> None:
        """Raises `ApiError` if one request asks for more sequences than are ever taken."""
        if count > self.most:
            expected = f"expected at most {self.most:,}"
            raise ApiError(f"too many sequences in one request; got {shown(count)}, {expected}", param="n")

    def submit(
        self, prompts: Sequence[Any], settings: Sequence[Mapping[str, Any]], deliver: Deliver, arrived: float
    ) -> list[int]:
        """Submits sequences, all or none; returns their numbers. Any thread may call it.

        Args:
          prompts: their token ids.
          settings: their other arguments of `Engine.submit`.
          deliver: takes their events.
          arrived: when the request came, by `time.perf_counter`.

        Raises:
          ApiError: there is no room for so many, or the engine refuses one of them or has failed.
        """
        self._admit(len(prompts))
        numbers = []
        try:
            for i, (prompt, rest) in enumerate(zip(prompts, settings, strict=True)):
                with self._lock:  # so that no event comes before its client is known
                    self._check_works()
                    number = self.engine.submit(prompt, **rest)
                    self._clients[number] = _Client(i, deliver, arrived)
                    self._metrics.prompt_tokens += len(prompt)
                numbers.append(number)
        except BaseException as error:
            with self._lock:
                self._open -= len(prompts) - len(numbers) if self.failure is None else 0
            self.cancel(numbers)
            if isinstance(error, PolarjaxError):
                raise (self._failed(503) if self.engine.closed else ApiError.of(error)) from error
            raise
        finally:
            self._work.set()
        return numbers

    def cancel(self, numbers: Sequence[int]) -> None:
        """Ends sequences that nobody waits for any more."""
        for number in numbers:
            self.engine.cancel(number)

    def _admit(self, count: int) -> None:
        """Takes places for so many sequences."""
        with self._lock:
            self._check_works()
            if self._open + count > self.most:
                headers = {"Retry-After": str(self._retry_after())}
                raise ApiError(
                    f"too many requests are waiting; at most {self.most:,} sequences are taken at a time",
                    status=429,
                    code="rate_limit_exceeded",
                    headers=headers,
                )
            self._open += count

    def _retry_after(self) -> int:
        """Seconds until about a slot's worth of requests will have ended, from how long they took so far."""
        done = self._metrics.duration
        return max(1, min(LONGEST_RETRY, math.ceil(done.total / max(done.count, 1))))

    def _check_works(self) -> None:
        if self.failure is not None:
            raise self._failed(503)
        if self._stopping:
            raise ApiError("the server is stopping", status=503)

    def _failed(self, status: int) -> ApiError:
        return ApiError(self.failure or "the engine is closed", status=status)

    def _run(self) -> None:
        try:
            while not self._stopping:
                for event in self.engine:
                    self._dispatch(event)
                self._work.wait()
                self._work.clear()
        except BaseException as error:
            self._fail(error)

    def _dispatch(self, event: Event) -> None:
        with self._lock:
            client = self._clients[event.request]
            if event.finished:
                del self._clients[event.request]
                self._open -= 1
        now = time.perf_counter()
        if event.tokens and not client.began:
            client.began = True
            self._metrics.first_token.add(now - client.arrived)
        self._metrics.generated_tokens += len(event.tokens)
        if event.finished:
            self._metrics.finished[event.finished] += 1
            self._metrics.duration.add(now - client.arrived)
        client.deliver(client.index, event)

    def _fail(self, error: BaseException) -> None:
        """Answers everybody who waits; nobody is admitted any more."""
        traceback.print_exception(error, file=sys.stderr)
        line = str(error) if isinstance(error, PolarjaxError) else f"{type(error).__name__}: {error}"
        with self._lock:
            self.failure = f"the engine has failed: {' '.join(line.split())}"
            clients, self._clients = list(self._clients.values()), {}
        self.engine.close()
        for each in clients:
            self._metrics.finished["failed"] += 1
            each.deliver(each.index, self._failed(500))
