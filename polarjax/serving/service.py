"""From the body of a request to its sequences in the engine, and their events back."""

import asyncio
import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from polarjax.checkpoint.bundle import Bundle, needed_tokenizer
from polarjax.engine.checks import prompt_ids
from polarjax.engine.engine import Engine
from polarjax.engine.requests import Event
from polarjax.generation.checks import SEEDS
from polarjax.numeric import shown
from polarjax.serving.body import Asked, parse, read_json
from polarjax.serving.errors import ApiError, checked
from polarjax.serving.metrics import Metrics
from polarjax.serving.replies import Model, Reply
from polarjax.serving.runner import Runner
from polarjax.text.prompts import characters, most_characters

COMPLETION_TOKENS = 16
"""New tokens of a completion that doesn't ask for a number, as in OpenAI's interface."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes.

    Attributes:
      body: bytes of a request's body.
      prompt: tokens of a prompt; None is what a slot holds.
      waiting: sequences that wait for a slot.
    """

    body: int = 4_000_000
    prompt: int | None = None
    waiting: int = 256


class Service:
    """An engine that answers requests.

    Args:
      bundle: the model, with a tokenizer.
      engine: of this bundle, which nobody else iterates.
      name: of the model.
      limits: what is taken.

    Attributes:
      stopping: whether new requests are refused.

    Raises:
      CheckpointError: the bundle has no tokenizer.
    """

    def __init__(self, bundle: Bundle, engine: Engine, *, name: str, limits: Limits) -> None:
        self.model = Model(name, needed_tokenizer(bundle, "serve"))
        self.limits, self.metrics, self.stopping = limits, Metrics(), False
        self.runner = Runner(engine, most_waiting=limits.waiting, metrics=self.metrics)
        self._bundle, self._engine = bundle, engine
        room = min(engine.capacity, bundle.model.config.max_positions)
        self._room = room + 1  # the last new token is never read
        self._longest = min(room, limits.prompt or room)
        self._characters = most_characters(self.model.tokenizer, self._longest)
        self._active, self._lock = 0, threading.Lock()

    @property
    def active(self) -> int:
        """Requests that were admitted and haven't been answered; once `stopping` is set, there come no more."""
        with self._lock:
            return self._active

    async def admit(self, raw: bytes, *, chat: bool) -> "Job":
        """Submits what a body asks for, in another thread, as reading long prompts takes time.

        Raises:
          ApiError: the body can't be used, there is no room, or the server is stopping or has failed.
        """
        job = Job(self, asyncio.get_running_loop(), time.perf_counter())
        try:
            await asyncio.to_thread(job.submit, raw, chat)
        except BaseException:
            job.close()
            raise
        return job

    def read(self, raw: bytes, chat: bool) -> tuple[Asked, list[Any], list[dict[str, Any]]]:
        """What a body asks for, the token ids of its prompts, and the settings of its sequences."""
        asked = parse(read_json(raw), self._bundle.generation, chat=chat, model=self.model.name)
        self.runner.check_size(len(asked.prompts) * asked.n)
        param = "messages" if chat else "prompt"
        prompts, settings = [], []
        for each in asked.prompts:
            self._check_characters(each, param)
            prompts.append(checked(param, prompt_ids, each, self._bundle))
            settings += self._settings(asked, len(prompts[-1]), param)
        return asked, prompts, settings

    def _check_characters(self, prompt: Any, param: str) -> None:
        """Raises `ApiError` for a text that can't fit, as tokenizing megabytes takes seconds."""
        if (got := characters(prompt)) > self._characters:
            raise ApiError(
                f"the prompt's {got:,} characters are too many; at most {self._characters:,} are taken, even of the "
                "longest tokens",
                param=param,
                code="context_length_exceeded",
            )

    def _settings(self, asked: Asked, tokens: int, param: str) -> list[dict[str, Any]]:
        """Those of the n sequences of a prompt, each with a seed of its own."""
        room, limit = self._room - tokens, asked.max_tokens
        if tokens > self._longest or (limit or 1) > room:
            too_long = tokens > self._longest
            raise ApiError(
                f"the prompt's {tokens:,} tokens and {shown(limit or 1)} new ones are too many; at most "
                f"{self._longest:,} are taken, and {self._room:,} together with the new ones",
                param=param if too_long else "max_tokens",
                code="context_length_exceeded",
            )
        if limit is None:
            usual = self._bundle.generation.max_new_tokens if asked.chat else COMPLETION_TOKENS
            limit = min(room, usual or room)
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        rest = {**asked.settings, "max_new_tokens": limit, "logprobs": asked.logprobs}
        return [rest | {"seed": _wrapped(seed + i)} for i in range(asked.n)]

    def began(self) -> None:
        """Counts a request that must be answered before the server ends; raises `ApiError` if it is stopping."""
        with self._lock:
            if self.stopping:
                raise ApiError("the server is stopping", status=503, headers={"Retry-After": "5"})
            self._active += 1

    def ended(self) -> None:
        """Counts one that was answered."""
        with self._lock:
            self._active -= 1

    def metrics_text(self) -> str:
        """What /metrics shows."""
        engine = self._engine
        return self.metrics.text(
            {
                "up": ("Whether the engine works.", int(self.runner.failure is None)),
                "slots": ("Slots of the engine.", engine.slots),
                "slots_in_use": ("Slots with a sequence.", engine.in_use),
                "sequences_waiting": ("Sequences without a slot.", engine.waiting),
                "requests_active": ("Requests that aren't answered yet.", self.active),
            }
        )


class Job:
    """A request while it is answered.

    Attributes:
      asked: what it asks for.
      reply: its answer as it grows.
    """

    asked: Asked
    reply: Reply

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop, arrived: float) -> None:
        self._service, self._loop, self._arrived = service, loop, arrived
        self._events: asyncio.Queue[tuple[int, Event | ApiError]] = asyncio.Queue()
        self._left: dict[int, int] = {}  # numbers of the sequences that go on, by index
        self._counted = self._closed = False

    def submit(self, raw: bytes, chat: bool) -> None:
        """Reads a body and submits its sequences."""
        service = self._service
        self.asked, prompts, settings = service.read(raw, chat)
        service.began()
        self._counted = True
        self.reply = Reply(self.asked, prompts, service.model)
        repeated = [ids for ids in prompts for _ in range(self.asked.n)]
        numbers = service.runner.submit(repeated, settings, self._deliver, self._arrived)
        self._left = dict(enumerate(numbers))
        if self._closed:  # while this thread was at it
            self.close()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all sequences, each with the sequence's index.

        Raises:
          ApiError: the engine has failed, or the model computed NaN or infinity.
        """
        while self._left:
            index, event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            if event.finished:
                del self._left[index]
            if event.finished == "failed":
                raise ApiError("the model computed NaN or infinity", status=500)
            if event.finished == "cancelled":
                raise ApiError("the server is stopping", status=503)
            yield index, event

    def close(self) -> None:
        """Frees the slots of what goes on."""
        self._closed = True
        self._service.runner.cancel(list(self._left.values()))
        self._left = {}
        if self._counted:
            self._counted = False
            self._service.ended()

    def _deliver(self, index: int, event: Event | ApiError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


def _wrapped(seed: int) -> int:
    """The seed, or what follows the largest one."""
    return (seed - SEEDS.start) % (SEEDS.stop - SEEDS.start) + SEEDS.start
