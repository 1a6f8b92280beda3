"""The host loop over the slots: admits requests, reads their prompts between decoding chunks, and hands out tokens."""

import contextlib
import functools
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np

from polarjax.checkpoint.bundle import Bundle
from polarjax.engine import checks, programs
from polarjax.engine.packing import Packer, Piece
from polarjax.engine.prefixes import Prefixes
from polarjax.engine.requests import ENDINGS, Event, Request
from polarjax.engine.sizes import plan_sizes, slots_and_capacity
from polarjax.engine.slots import Drawn, Reading, Slots
from polarjax.generation.sampling import Sampler
from polarjax.generation.token_loop import CHUNK
from polarjax.memory import explained_out_of_memory
from polarjax.model.checks import check_implementation
from polarjax.model.meshes import without_mesh
from polarjax.numeric import whole_number
from polarjax.text.prompts import Message
from polarjax.types import Array, Implementation, Int, Int32

READ_TOKENS = 2048
"""Prompt tokens that are read between two decoding chunks, at most."""


class Engine(Iterator[Event]):
    """Continues requests as they come, many at a time: each gets a slot, and frees it for the next when it ends.

    Iterating runs the requests and yields their events until nothing is left to do; then more can be submitted. Any
    thread may submit, cancel and close while one iterates; where several iterate, each event goes to one of them. A
    request's tokens don't depend on its slot, its company or when it came, unless the plan selects neurons, which is
    done for all running rows together, or rounding tips a near tie, which it can on a GPU and in half precision. A
    prompt that begins with 32 tokens or more that a slot still holds reads only the rest.

    Args:
      bundle: the model, with a tokenizer for text and with routers and plans for sparse decoding.
      slots: B, requests that run at a time; None takes what the device's memory allows, 8 if it doesn't say.
      capacity: S, positions of a slot: prompt and new tokens but the last; None takes the model's positions, at most
        4,096, and no slot has more than the model.
      head_density: fraction of groups to keep; None is the calibrated default.
      dense: decode densely even if the bundle has routers and plans.
      read_tokens: most tokens of prompts that are read between two chunks of decoding steps: more fill the slots
        sooner, fewer let running requests wait less.
      implementation: "mosaic" (our kernels, for Hopper GPUs) or "xla"; None takes the best for the device.

    Attributes:
      slots, capacity: B and S.

    Raises:
      InputError: a size isn't a positive whole number, or doesn't fit into the device's memory.
      SparsityError: the density isn't one, or there are no routers or plans for it.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        slots: int | None = None,
        capacity: int | None = None,
        head_density: float | None = None,
        dense: bool = False,
        read_tokens: int = READ_TOKENS,
        implementation: Implementation = None,
    ) -> None:
        bundle = checks.as_bundle(bundle)
        checks.check_dense(dense, head_density)
        check_implementation(implementation)
        most = whole_number(read_tokens, "read_tokens", where="Engine")
        config, dtype = bundle.model.config, bundle.model.dtype
        room = checks.sizes_of(bundle, most)
        self.slots, self.capacity = slots_and_capacity(config, dtype, slots, capacity, **room)
        self._bundle, self._model = bundle, programs.Flat(bundle.model)
        skipped = checks.skipped(bundle, plan_sizes(self.slots), dense, head_density)
        fixed = {"steps": CHUNK, "implementation": implementation}
        self._chunks = {size: fixed | {"sparsity": each} for size, each in skipped.items()}
        mesh, sizes = room["mesh"], {"batch_size": self.slots, "cache_length": self.capacity, "dtype": dtype}
        self._explained = functools.partial(
            explained_out_of_memory, config, **sizes, mesh=mesh, option="slots"
        )
        with without_mesh(), self._explained():
            self._slots: Slots | None = programs.make(self._model, self.slots, self.capacity)
        sizes = {"slots": self.slots, "capacity": self.capacity, "shards": mesh.data}
        self._packer = Packer(most, **sizes, best=self._slots.rules.best)
        self._prefixes, self._ids = Prefixes(self.slots), itertools.count()
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        self._reading: list[Request] = []
        self._running: dict[int, Request] = {}
        self._unused, self._halted = deque(range(self.slots)), np.zeros(self.slots, bool)
        self._cancelled: deque[int] = deque()
        self._sent: deque[tuple[Drawn, list[tuple[int, Request]]]] = deque()
        self._events: deque[Event] = deque()
        self._entry = threading.Lock()  # of what comes: no request enters an engine that is being closed
        self._work = threading.RLock()  # of the slots and of what runs; taken before `_entry`

    def submit(
        self,
        prompt: str | Sequence[Message] | Sequence[int] | Int[Array, "n"],
        *,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        stop_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        logprobs: int | None = None,
    ) -> int:
        """Queues a request; returns its id, which its events carry. Defaults come from the model's
        generation_config.json, as in `Bundle.complete`.

        Args:
          prompt: a text, a conversation for the chat template, or token ids [n].
          max_new_tokens: most new tokens; None is the model's, or 64, limited by the positions left.
          sampler: `Greedy()`, or a `Categorical` of single numbers.
          stop_ids: ids that end the request, at most 16.
          stop_strings: strings that end the request and are cut off.
          repetition_penalty: above 1, makes ids already in the text less likely.
          seed: a sampler draws what `generate` draws for this prompt alone with a threefry `jax.random.key(seed)`.
          logprobs: n, at most 20; events then have the log-probabilities of their tokens and of the n likeliest ones.

        Raises:
          InputError: the engine is closed, the prompt is empty or too long, or an option is out of range.
          CheckpointError: text is given or to be found, but the bundle has no tokenizer.
        """
        request = checks.as_request(
            next(self._ids),
            prompt,
            self._bundle,
            self.capacity,
            seed=seed,
            logprobs=logprobs,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            stop_ids=stop_ids,
            stop_strings=stop_strings,
            repetition_penalty=repetition_penalty,
        )
        with self._entry:
            checks.check_open(self.closed)
            self._requests[request.id] = request
            self._waiting.append(request)
        return request.id

    def cancel(self, request: int) -> bool:
        """Ends a request; its last event, "cancelled", follows. False if it has already finished, or there is none."""
        if going := whole_number(request, "request", where="Engine.cancel", least=0) in self._requests:
            self._cancelled.append(request)
        return going

    def close(self) -> None:
        """Drops all requests and frees the slots' memory, once the device has finished what was sent."""
        with self._work, self._entry:
            self._settle()
            self._slots = None
            for x in (self._requests, self._waiting, self._reading, self._running, self._sent, self._events):
                x.clear()
            self._unused = deque(range(self.slots))

    def _settle(self) -> None:
        """Waits for what was sent: a process that ends while the device works is aborted."""
        with contextlib.suppress(Exception):  # slots that were donated to a failed call are lost
            jax.block_until_ready(self._slots)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Event:
        """The next event; waits for the device if there is none yet."""
        with self._work:
            while not self._events:
                if not self._requests:
                    self._settle()
                    raise StopIteration
                with self._closed_on_failure():
                    self._turn()
            return self._events.popleft()

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._slots is None

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def in_use(self) -> int:
        """Slots with a request whose prompt is being read or that is running."""
        return self.slots - len(self._unused)

    def reset(self) -> None:
        """Forgets what slots hold: requests then run as on a new engine. Raises `InputError` if a slot is in use."""
        with self._work:
            checks.check_idle(self.in_use, "Engine.reset")
            self._prefixes, self._unused = Prefixes(self.slots), deque(range(self.slots))

    def warm_up(self) -> None:
        """Compiles all programs that the engine can need, so that no request waits for one.

        Raises:
          InputError: the engine is closed, or requests have slots: steps that nobody looks at would lose their tokens.
        """
        with self._work:
            checks.check_open(self.closed)
            checks.check_idle(self.in_use, "Engine.warm_up")
            with self._closed_on_failure():
                readings = [self._packer.reading([], shape) for shape in self._packer.shapes]
                halted, chunks = jax.device_put(self._halted), self._chunks.values()
                programs.compile_all(self._model, self._slots, readings, halted, chunks)
                for reading in readings:
                    self._call(programs.read, reading)
                for size in self._chunks:
                    self._decode(size)
                self._copy(0, 0, np.zeros(0, np.int32))
                jax.block_until_ready(self._slots)

    def _turn(self) -> None:
        """Sends the device its next work, then handles what came before it, so that it never waits for the host."""
        while self._cancelled:
            self._finish(self._requests.get(self._cancelled.popleft()))
        while self._unused and self._waiting:
            request = self._waiting.popleft()
            request.slot = self._packer.next_slot(self._unused)
            self._share_prefix(request, self._prefixes.begin(request.slot, request.prompt))
            self._reading.append(request)
        before, quiet = len(self._sent), not self._running
        self._read_prompts()
        at_once = quiet and not self._reading  # first tokens, as no row waits for the next step
        if self._running and not at_once:
            self._decode_chunk()
        ahead = 1 if len(self._sent) > before and not at_once else 0
        while len(self._sent) > ahead:
            self._handle(*self._sent.popleft())

    def _share_prefix(self, request: Request, found: tuple[int, int] | None) -> None:
        """Copies the beginning of the prompt from the slot that was found to have it."""
        if found is not None:
            source, request.read = found
            self._copy(source, request.slot, request.prompt[: request.read])

    def _copy(self, source: int, target: int, ids: Int32[np.ndarray, "n"]) -> None:
        """Copies the slot `source`, which holds these tokens, into the slot `target`."""
        tokens = np.pad(ids, (0, self.capacity - len(ids)))
        numbers = jax.device_put((np.int32(source), np.int32(target), tokens, np.int32(len(ids))))
        self._slots = programs.share(self._slots, *numbers, layout=self._bundle.model.layout)

    def _read_prompts(self) -> None:
        """Sends as many calls as have `read_tokens` tokens together."""
        left = self._packer.most
        while self._reading and (packed := self._packer.pack(self._reading, left)):
            left -= packed[1].pieces.tokens.size // self._packer.shards
            self._read(*packed)

    def _read(self, pieces: Sequence[Piece], reading: Reading) -> None:
        begun = []
        for piece in pieces:
            request = piece.request
            request.read += piece.count
            if not request.unread:
                request.drawn = 1
                self._halted[request.slot] = False  # of the request before
                self._running[request.slot] = request
                begun.append((request.slot, request))
        self._reading = [each for each in self._reading if each.unread]
        self._sent.append((self._call(programs.read, reading), begun))
        self._release()

    def _decode_chunk(self) -> None:
        rows = list(self._running.items())
        self._sent.append((self._decode(self._packer.evenly(self._running)), rows))
        for _, request in rows:
            request.drawn += CHUNK
        self._release()

    def _release(self) -> None:
        """Frees the slots of requests that will have reached their limits by the time the device gets further work."""
        ending = [slot for slot, request in self._running.items() if request.ends_by_itself]
        for slot in ending:
            del self._running[slot]
        self._unused.extend(ending)

    def _decode(self, rows: int) -> Drawn:
        """A chunk of steps with the plan for so many rows."""
        options = next(options for size, options in self._chunks.items() if size >= rows)
        halted, self._halted = jax.device_put(self._halted), np.zeros(self.slots, bool)
        return self._call(programs.decode, halted, **options)

    def _call(self, program, *args: Any, **kwargs: Any) -> Drawn:
        self._slots, drawn = programs.call(program, self._model, self._slots, *args, **kwargs)
        return drawn

    def _handle(self, drawn: Drawn, rows: list[tuple[int, Request]]) -> None:
        """Makes events of what a call drew."""
        tokens, counts, ended = jax.device_get((drawn.tokens, drawn.counts, drawn.ended))
        asked = any(request.settings.logprobs is not None for _, request in rows)
        logprobs = jax.device_get(drawn.logprobs) if asked else None
        for slot, request in [(slot, each) for slot, each in rows if each.id in self._requests]:
            wanted = request.settings.logprobs is not None
            mine = jax.tree.map(lambda leaf, slot=slot: leaf[slot], logprobs) if wanted else None
            new, ending = tokens[slot, : counts[slot]].tolist(), ENDINGS.get(int(ended[slot]))
            if new:
                self._prefixes.keep(slot, request.prompt)
            event = request.event(new, ending, mine)
            if event.tokens or event.finished:
                self._events.append(event)
            if event.finished:
                self._forget(request)

    def _finish(self, request: Request | None) -> None:
        """Ends a request that was cancelled, unless it ended before."""
        if request is not None:
            self._events.append(request.event([], "cancelled", None))
            self._forget(request)

    def _forget(self, request: Request) -> None:
        """Frees the request's slot, or its place among those that wait, if it still has one."""
        with self._entry:
            del self._requests[request.id]
            if request.slot < 0:
                self._waiting.remove(request)
        if request in self._reading:
            self._reading.remove(request)
            self._unused.append(request.slot)
        elif self._running.get(request.slot) is request:
            del self._running[request.slot]
            self._halted[request.slot] = True
            self._unused.append(request.slot)

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        """Closes the engine if a call fails, as slots that were donated to it are lost; explains a lack of memory."""
        try:
            with without_mesh(), self._explained():
                yield
        except BaseException:
            self.close()
            raise
