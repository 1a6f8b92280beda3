"""Starting as one of several processes: they meet at process 0, then JAX connects their devices."""

import atexit
import os
import socket
import sys
import time
import traceback
from importlib.metadata import version
from typing import Any

from polarjax.distributed import places
from polarjax.distributed.group import DIED, Group, Peer
from polarjax.distributed.places import AUTO, Place
from polarjax.distributed.relay import relay
from polarjax.distributed.wire import Wire, connect, free_port, listen
from polarjax.errors import InputError, PolarjaxError
from polarjax.numeric import whole_number

_GREETING_SECONDS = 10.0
_HEARTBEAT_SECONDS = 60
"""So much later JAX itself would notice that a process is gone."""

_LONGEST = 500
"""Characters of an error that other processes repeat."""

_VERSIONS = ("polarjax", "jax", "jaxlib")

_group: Group | None = None


def group() -> Group | None:
    """The processes that this one belongs to; None if it runs alone."""
    return _group


def initialize(
    coordinator: str = AUTO,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 30,
    start_timeout: int = 300,
) -> None:
    """Makes this process one of several that run the same program over a mesh of all their devices.

    Call it before anything else of JAX. The processes meet at process 0, must be of the same versions and have equally
    many devices, and are then connected by `jax.distributed`. From then on, a process that dies or fails ends the
    others with a line on standard error that names it: at once if its machine still answers, otherwise after `timeout`.

    Args:
      coordinator: HOST:PORT where process 0 listens, or "auto": from the variables of SLURM, Open MPI, Kubernetes or
        torchrun.
      processes: their number; None takes it from the environment too.
      process_id: number of this process, from 0; None takes it from the environment too.
      timeout: seconds after which a process that doesn't answer counts as dead.
      start_timeout: seconds in which all processes must have come.

    Raises:
      InputError: an argument is missing, not all processes came, or they differ.
    """
    place = places.find(coordinator, processes, process_id)
    timeout = whole_number(timeout, "timeout", where="initialize")
    start_timeout = whole_number(start_timeout, "start_timeout", where="initialize")
    _check_first()
    versions = {name: version(name) for name in _VERSIONS}
    made, address = _meet(place, versions, timeout, start_timeout)
    global _group
    _group = made
    _end_together(made)
    _connect_devices(place, address, timeout, start_timeout)
    import jax

    kinds = sorted({each.device_kind for each in jax.local_devices()})
    made.agree(
        {"their number of devices": jax.local_device_count(), "their kind of device": ", ".join(kinds)},
        hint="give every process as many devices of one kind",
    )


def _check_first() -> None:
    """Raises `InputError` if this has been called before, or JAX has found its devices."""
    from jax._src import xla_bridge

    if _group is not None or xla_bridge.backends_are_initialized():
        hint = "call polarjax.distributed.initialize once, before anything else"
        what = "initialized twice" if _group is not None else "JAX already runs as one process"
        raise InputError(what, where="polarjax.distributed.initialize", hint=hint)


def _connect_devices(place: Place, address: str, timeout: int, start_timeout: int) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # which would swallow SIGTERM
    if place.process_id:
        address = relay(*places.host_and_port(address))
    jax.distributed.initialize(
        address,
        place.processes,
        place.process_id,
        None if place.local_device_ids is None else list(place.local_device_ids),
        cluster_detection_method="deactivate",
        initialization_timeout=start_timeout,
        heartbeat_timeout_seconds=timeout + _HEARTBEAT_SECONDS,
    )


def _meet(place: Place, versions: dict[str, str], timeout: int, seconds: int) -> tuple[Group, str]:
    """The connected processes, and the address where JAX's own service will be."""
    greeting = {"kind": "hello", "processes": place.processes, "process_id": place.process_id}
    greeting |= {"machine": socket.gethostname(), "versions": versions}
    meet = _join if place.process_id else _gather
    return meet(place, greeting, timeout, seconds)


def _join(place: Place, greeting: dict[str, Any], timeout: int, seconds: int) -> tuple[Group, str]:
    """Connects to process 0."""
    end = time.monotonic() + seconds
    where = f"{place.host}:{place.port}"
    connection = connect(place.host, place.port, seconds)
    if connection is None:
        hint = "start process 0 too; check the address, and that no firewall closes the port"
        raise InputError("process 0 doesn't answer", where=where, got=f"nothing in {seconds} s", hint=hint)
    wire = Wire(connection)
    wire.send(**greeting)
    wire.limit(max(end - time.monotonic(), 0) + _GREETING_SECONDS)  # process 0 ends first
    answer = wire.receive()
    if answer is None or answer.get("kind") != "start":
        wire.close()
    if answer is None or answer.get("kind") not in ("start", "refused"):
        hint = "look at what process 0 says, or choose another port"
        raise InputError("process 0 has ended, or something else listens there", where=where, hint=hint)
    if answer["kind"] == "refused":
        raise InputError(**answer["value"])
    first = Peer(0, answer["machine"], wire)
    return Group(place.process_id, [first], place.processes, timeout), answer["value"]


def _gather(place: Place, greeting: dict[str, Any], timeout: int, seconds: int) -> tuple[Group, str]:
    """Waits for all other processes."""
    try:
        listening = listen(place.host, place.port)
    except OSError as error:
        hint = "choose a port that is free on the machine of process 0"
        raise InputError(
            "process 0 can't listen", where=f"{place.host}:{place.port}", got=error.strerror, hint=hint
        ) from error
    peers: dict[int, Peer] = {}
    end = time.monotonic() + seconds
    with listening:
        while len(peers) < place.processes - 1:
            listening.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                break
            wire = Wire(connection)
            wire.limit(_GREETING_SECONDS)
            hello = wire.receive()
            if hello is None or hello.get("kind") != "hello" or type(hello.get("process_id")) is not int:
                wire.close()  # somebody else
                continue
            refusal = _refusal(hello, greeting, peers)
            if refusal is not None:
                _refuse([*peers.values(), Peer(-1, "", wire)], refusal)
            peers[hello["process_id"]] = Peer(hello["process_id"], hello["machine"], wire)
    if missing := sorted(set(range(1, place.processes)) - set(peers)):
        _refuse(list(peers.values()), _missing(missing, place, seconds))
    address = f"{f'[{place.host}]' if ':' in place.host else place.host}:{free_port(place.host)}"
    for each in peers.values():
        each.wire.send(kind="start", value=address, machine=greeting["machine"])
    return Group(0, list(peers.values()), place.processes, timeout), address


def _refusal(hello: dict[str, Any], mine: dict[str, Any], peers: dict[int, Peer]) -> dict[str, Any] | None:
    """Why a process can't be part of the group, as arguments of `InputError`; None if it can."""
    number, machine = hello.get("process_id"), hello.get("machine")
    theirs = f"process {number} ({machine})"
    if hello.get("processes") != mine["processes"]:
        return {
            "what": "the processes differ in how many they are",
            "where": "--processes",
            "got": f"process 0 ({mine['machine']}): {mine['processes']}; {theirs}: {hello.get('processes')}",
            "hint": "give every process the same --processes",
        }
    if hello.get("versions") != mine["versions"]:
        shown = lambda each: ", ".join(f"{name} {number}" for name, number in (each or {}).items())
        mine_shown, theirs_shown = shown(mine["versions"]), shown(hello.get("versions"))
        return {
            "what": "the processes differ in their versions",
            "where": "many hosts",
            "got": f"process 0 ({mine['machine']}): {mine_shown}; {theirs}: {theirs_shown}",
            "hint": "install the same versions on every machine",
        }
    if number in peers or number == 0:
        other = peers[number].machine if number in peers else mine["machine"]
        return {
            "what": "two processes have one number",
            "where": "--process-id",
            "got": f"{number} on {other} and on {machine}",
            "hint": "give each process a number of its own, from 0",
        }
    return None


def _missing(numbers: list[int], place: Place, seconds: int) -> dict[str, Any]:
    named = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
    return {
        "what": f"process{'es' if len(numbers) > 1 else ''} {named} did not come",
        "where": f"{place.host}:{place.port}",
        "got": f"{place.processes - len(numbers)} of {place.processes} processes in {seconds} s",
        "hint": "start every process with the same --coordinator; check that they can reach its port",
    }


def _refuse(peers: list[Peer], refusal: dict[str, Any]) -> None:
    """Tells all, and raises the same `InputError` here."""
    for each in peers:
        each.wire.send(kind="refused", value=refusal)
        each.wire.close()
    raise InputError(**refusal)


def _end_together(made: Group) -> None:
    """Makes an uncaught error here end the other processes, and an ordinary end not."""
    shown = sys.excepthook

    def failed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, PolarjaxError | KeyboardInterrupt):
            made.await_news()
        shown(kind, error, trace)
        end_all("".join(traceback.format_exception_only(kind, error)), DIED)

    sys.excepthook = failed
    atexit.register(made.leave)


def end_all(what: str, code: int) -> None:
    """Ends this process and, with a line about it, the others. Returns if it runs alone."""
    if _group is None:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _group.fail(" ".join(what.split())[:_LONGEST], code)
    os._exit(code)  # JAX would wait for processes that have ended
