"""Listens on a socket, and ends on signals: the first lets what runs finish, the second ends at once."""

import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from polarjax.errors import InputError
from polarjax.serving.app import make_app
from polarjax.serving.service import Service

if TYPE_CHECKING:
    import uvicorn

CLOSING_SECONDS = 5
"""That connections get to take their last bytes."""


def check_installed() -> None:
    """Raises `InputError` if the libraries of the extra `serve` are missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the server needs the libraries starlette and uvicorn",
            where="polarjax serve",
            got=str(error),
            hint="pip install 'polarjax[serve]'",
        ) from error


def listen_on(host: str, port: int) -> socket.socket:
    """A socket with this address, on which nothing is answered yet; raises `InputError` if it can't be had."""
    made = None
    try:
        if port not in range(2**16):  # the system would take its lower bits
            raise OverflowError("no such port")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if made is not None:
            made.close()
        raise _not_listening(f"--host {host} --port {port}", error) from error
    return made


def _not_listening(where: str, error: Exception) -> InputError:
    return InputError(
        "can't listen there",
        where=where,
        got=getattr(error, "strerror", None) or str(error),
        hint="choose another --port, or 0 for any that is free; --host 127.0.0.1 is this machine alone",
    )


def address_of(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def run(
    service: Service, listening: socket.socket, *, api_key: str | None, ready: Callable[[], None]
) -> None:
    """Serves until a signal, or until `service.stopping` is set; finishes what it has taken.

    In the main thread, the first SIGTERM or SIGINT makes it refuse what is new and the second ends the process.

    Args:
      service: whose engine is warm.
      listening: from `listen_on`.
      api_key: that clients need; None lets everybody in.
      ready: called once it takes requests.

    Raises:
      InputError: another process has begun to listen at this address since `listen_on`.
    """
    try:
        listening.listen()  # here, as uvloop says nothing if it can't
    except OSError as error:
        raise _not_listening(address_of(listening), error) from error
    service.runner.start()
    try:
        _server(service, api_key, ready).run(sockets=[listening])
    finally:
        service.runner.stop()


def _server(service: Service, api_key: str | None, ready: Callable[[], None]) -> "uvicorn.Server":
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if service.stopping:
                os._exit(128 + sig)  # whatever the engine's thread does
            service.stopping = True
            active = service.active
            left = f"finishing {active} request{'s' * (active != 1)}" if active else "stopping"
            print(f"polarjax: {left}; a second signal ends at once", file=sys.stderr, flush=True)

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = self.should_exit or (service.stopping and not service.active)
            return await super().on_tick(counter)

    config = uvicorn.Config(
        make_app(service, api_key),
        lifespan="off",
        ws="none",
        log_config=None,  # what goes wrong is printed by the root logger
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    return Server(config)
