"""A connection between two processes: it carries JSON, a message a line, and breaks soon after one of them is gone."""

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
      timeout: seconds after which a machine that doesn't answer counts as gone.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._socket, self._lock = connection, threading.Lock()
        self._lines = connection.makefile("rb")
        _keep_alive(connection, timeout)

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
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def limit(self, seconds: float | None) -> None:
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


def _keep_alive(connection: socket.socket, seconds: float) -> None:
    """Makes the system look whether the other machine is still there, and break the connection if not."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third = max(1, int(seconds / 3))
    options = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": third, "TCP_KEEPINTVL": third, "TCP_KEEPCNT": 2}
    options["TCP_USER_TIMEOUT"] = int(seconds * 1000)
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
