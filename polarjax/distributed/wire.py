"""A connection between two processes: it carries JSON, a message a line, and breaks when one of them is gone."""

import contextlib
import ipaddress
import json
import socket
import threading
import time
from typing import Any

_LONGEST = 1 << 20
"""Bytes of a message; longer ones come from somebody else."""

_RETRY_SECONDS = 0.1


class Wire:
    """A connection.

    Args:
      connection: the socket.

    Attributes:
      silent: whether it broke because nothing came in time.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._lock, self.silent = connection, threading.Lock(), False
        self._lines = connection.makefile("rb")

    def send(self, **message: Any) -> bool:
        """Sends a message; False if the other end is gone."""
        with self._lock:
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The next message; None if the other end is gone or sends something else."""
        try:
            line = self._lines.readline(_LONGEST)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError) as error:
            self.silent = isinstance(error, TimeoutError)
            return None
        return message if isinstance(message, dict) else None

    def limit(self, seconds: float) -> None:
        """Waits at most so long for a message, from now on."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Closes the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._socket.close()


def listen(host: str, port: int) -> socket.socket:
    """Listens on the port: on this machine alone if the host is its loopback address, otherwise on all addresses."""
    if is_loopback(host):
        return socket.create_server((host, port), family=_family(host))
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def is_loopback(host: str) -> bool:
    """Whether the host is this machine by its loopback address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def free_port(host: str) -> int:
    """A port that nobody uses at the moment."""
    with listen(host, 0) as found:
        return found.getsockname()[1]


def connect(host: str, port: int, seconds: float) -> socket.socket | None:
    """Connects, trying again until somebody listens or the time is up."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            return socket.create_connection((host, port), timeout=left)
        except OSError:
            time.sleep(min(_RETRY_SECONDS, left))
    return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
