"""Processes that run one program together: all are connected to process 0, and what one of them meets, all learn."""

import dataclasses
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from polarjax.distributed.wire import Wire
from polarjax.errors import InputError

DIED = 1
"""Exit code of processes that end because another one did."""

_CALLS = 4
"""How often a process says that it is there before others think that it is dead."""

_GRACE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another process: its number, its machine's name, the connection to it, and what it has sent."""

    number: int
    machine: str
    wire: Wire
    inbox: queue.Queue[dict[str, Any]] = dataclasses.field(default_factory=queue.Queue)

    def __str__(self) -> str:
        return f"process {self.number} ({self.machine})"

    def take(self, kind: str) -> Any:
        """The value of the next message, which has this kind; waits for it."""
        message = self.inbox.get()
        if message.get("kind") != kind:
            raise RuntimeError(f"{self}: got {message.get('kind')}, expected {kind}")
        return message.get("value")


class Group:
    """This process's connections to others, watched by a thread each: process 0 has one to every other, these to it.

    Args:
      process_id: of this process.
      peers: those that it is connected to.
      count: of all processes.
      timeout: seconds after which one that says nothing counts as dead.
    """

    def __init__(self, process_id: int, peers: list[Peer], count: int, timeout: float) -> None:
        self.process_id, self.count = process_id, count
        self._peers = {each.number: each for each in peers}
        self._me = f"process {process_id} ({socket.gethostname()})"
        self._ending = threading.Lock()
        self._left = False
        threading.Thread(target=self._call, args=(timeout / _CALLS,), name="calls", daemon=True).start()
        for each in peers:
            each.wire.limit(timeout)
            threading.Thread(target=self._watch, args=(each,), name=f"watch {each}", daemon=True).start()

    def agree(self, values: Mapping[str, Any], *, hint: str) -> None:
        """Returns when all processes have called this, if they have the same values.

        Args:
          values: by what they are called, in a form that JSON can hold.
          hint: how to make them the same.

        Raises:
          InputError: they differ; every process raises it.
        """
        if self.process_id:
            self._peers[0].wire.send(kind="agree", value=dict(values))
            difference = self._peers[0].take("agreed")
        else:
            found = {self._me: dict(values)}
            found |= {str(each): each.take("agree") for each in self._in_order()}
            difference = _difference(found)
            for each in self._in_order():
                each.wire.send(kind="agreed", value=difference)
        if difference is not None:
            what, got = difference
            raise InputError(f"the processes differ in {what}", where="many hosts", got=got, hint=hint)

    def broadcast(self, value: Any = None) -> Any:
        """The value that process 0 gives; those of other processes are ignored. JSON must hold it."""
        if self.process_id:
            return self._peers[0].take("broadcast")
        for each in self._in_order():
            each.wire.send(kind="broadcast", value=value)
        return value

    def leave(self) -> None:
        """Says that this process has done its part and may end without the others."""
        with self._ending:
            self._left = True
        self._tell(kind="left")
        for each in self._in_order():
            each.wire.close()

    def await_news(self) -> None:
        """Waits for the news that another process has died or failed, if it has; this process then ends with it.

        To call before an error that another process's end may have caused is shown.
        """
        time.sleep(_GRACE_SECONDS)

    def fail(self, what: str, code: int) -> None:
        """Ends the other processes with this exit code and the line that this one failed, and why."""
        with self._ending:
            self._left = True
        self._tell(kind="end", value=f"{self._me} failed: {what}", code=code)

    def _in_order(self) -> Iterator[Peer]:
        return (self._peers[number] for number in sorted(self._peers))

    def _tell(self, **message: Any) -> None:
        for each in self._in_order():
            each.wire.send(**message)

    def _call(self, seconds: float) -> None:
        """Tells the others, again and again, that this process is there."""
        while not self._left:
            self._tell(kind="here")
            time.sleep(seconds)

    def _watch(self, peer: Peer) -> None:
        """Takes what the peer sends, until it has left or died."""
        left = False
        while (message := peer.wire.receive()) is not None:
            kind = message.get("kind")
            if kind == "end":
                self._end(str(message.get("value")), int(message.get("code", DIED)))
            elif kind != "here":
                left = left or kind == "left"
                peer.inbox.put(message)
        if not left:
            self._end(f"{peer} {'does not answer' if peer.wire.silent else 'died'}", DIED)

    def _end(self, why: str, code: int) -> None:
        """Ends this process with a line, and tells the others; the main thread may wait for the dead one forever."""
        with self._ending:
            if self._left:
                return
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"polarjax: {why}\n".encode())
            self._tell(kind="end", value=why, code=code)
            os._exit(code)


def _difference(found: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    """The first name whose values differ, and the values; None if all are the same."""
    names = {name: None for values in found.values() for name in values}
    for name in names:
        values = {process: each.get(name) for process, each in found.items()}
        first, *others = values.items()
        other = next((each for each in others if each[1] != first[1]), None)
        if other is not None:
            return name, "; ".join(f"{process}: {value}" for process, value in (first, other))
    return None
