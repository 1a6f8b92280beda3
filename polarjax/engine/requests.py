"""A request on the host: what it asks for, how far it is, and the events that it becomes."""

import dataclasses
from typing import Literal

import numpy as np

from polarjax.engine.slots import FAILED, LENGTH, STOPPED
from polarjax.generation.logprobs import LogProbs
from polarjax.text.assembly import Assembler
from polarjax.types import Int32

type Finished = Literal["stop", "length", "failed", "cancelled"]

ENDINGS: dict[int, Finished] = {STOPPED: "stop", LENGTH: "length", FAILED: "failed"}
"""Why a row has ended, by how it is in `Drawn`."""


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of a request, or its end.

    Attributes:
      request: the id that `submit` returned.
      tokens: new token ids; up to the one that ended the request.
      text: new text, without the stop string; "" if the model has no tokenizer. Text that may still change or be part
        of a stop string comes with a later event.
      finished: None while the request goes on, or why it ended: "stop" (a stop id or string), "length"
        (`max_new_tokens`), "failed" (its logits were NaN or infinite), or "cancelled".
      logprobs: log-probabilities of the tokens as NumPy arrays [c] and [c n], if they were asked for.
    """

    request: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    finished: Finished | None = None
    logprobs: LogProbs | None = None


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """A request's settings in the form that slots take; see `Rules`."""

    sampler: tuple[float, int, float]
    stop_ids: tuple[int, ...]
    limit: int
    seed: int
    repetition_penalty: float
    logprobs: int | None


@dataclasses.dataclass(eq=False)
class Request:
    """A request that isn't finished.

    Attributes:
      id: its number.
      prompt: token ids, int32 [n].
      settings: how it is continued.
      assembler: turns its tokens into text; None without a tokenizer.
      slot: the row that it has, once admitted.
      read: tokens of the prompt that were sent to the device.
      drawn: the most new tokens that it can have after all calls that were sent to the device.
    """

    id: int
    prompt: Int32[np.ndarray, "n"]
    settings: RowSettings
    assembler: Assembler | None
    slot: int = -1
    read: int = 0
    drawn: int = 0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that weren't sent to the device yet."""
        return len(self.prompt) - self.read

    @property
    def ends_by_itself(self) -> bool:
        """Whether the calls that were sent to the device use up its limit."""
        return self.drawn >= self.settings.limit

    def event(self, tokens: list[int], finished: Finished | None, logprobs: LogProbs | None) -> Event:
        """The event of new tokens; finds stop strings in them."""
        text = ""
        if self.assembler is not None:
            before = len(self.assembler.tokens)
            text = self.assembler.push(tokens)
            if finished is not None or self.assembler.stopped:
                text += self.assembler.finish()  # which can complete a stop string
            if self.assembler.stopped:
                finished, tokens = "stop", self.assembler.tokens[before:]
        if logprobs is not None:
            kept, n = len(tokens), self.settings.logprobs
            logprobs = LogProbs(logprobs.chosen[:kept], logprobs.ids[:kept, :n], logprobs.best[:kept, :n])
        return Event(self.id, tuple(tokens), text, finished, logprobs)
