"""Keeps JAX from hearing of process 0's end before the group does.

JAX ends a process the moment the connection to its service in process 0 breaks, with a page of text that names nobody.
The other processes therefore connect through a relay of their own, which keeps their side open a little longer.
"""

import contextlib
import socket
import threading
import time

_LINGER_SECONDS = 5.0
_BYTES = 1 << 16


def relay(host: str, port: int) -> str:
    """Listens on this machine, and passes on what comes to and from the address; returns its own address."""
    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(listening, host, port), name="relay", daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}"


def _serve(listening: socket.socket, host: str, port: int) -> None:
    while True:
        near, _ = listening.accept()
        try:
            far = socket.create_connection((host, port))
        except OSError:
            near.close()
            continue
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_pass_on, args=(near, far, 0.0), name="relay out", daemon=True).start()
        threading.Thread(
            target=_pass_on, args=(far, near, _LINGER_SECONDS), name="relay in", daemon=True
        ).start()


def _pass_on(source: socket.socket, target: socket.socket, linger: float) -> None:
    """Passes bytes on until the source ends; then closes the target after so many seconds."""
    with contextlib.suppress(OSError):
        while data := source.recv(_BYTES):
            target.sendall(data)
    time.sleep(linger)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
    target.close()
