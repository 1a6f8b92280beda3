"""Which of how many processes this is, and where process 0 is: from arguments, or from what started the processes."""

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from polarjax.errors import InputError
from polarjax.numeric import whole_number

AUTO = "auto"
_PROCESSES_OF_A_MACHINE = ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among others.

    Attributes:
      host, port: where process 0 listens.
      processes: their number.
      process_id: of this one, from 0.
      local_device_ids: the GPUs of this machine that are this process's; None for all.
    """

    host: str
    port: int
    processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def find(coordinator: str = AUTO, processes: int | None = None, process_id: int | None = None) -> Place:
    """The place that the arguments describe; "auto" takes what isn't given from the environment.

    Raises:
      InputError: an argument is missing or out of range, or there is nothing in the environment.
    """
    found: dict[str, Any] = {} if coordinator != AUTO else _found()
    given = {"processes": processes, "process_id": process_id}
    given = {name: value for name, value in given.items() if value is not None}
    values: dict[str, Any] = {"coordinator": coordinator} | found | given
    for name in ("processes", "process_id"):
        if name not in values:
            option = "--" + name.replace("_", "-")
            hint = f"give {option} to every process"
            raise InputError(f"{name} is missing", where="--coordinator", got=coordinator, hint=hint)
    count = whole_number(values["processes"], "processes", where="--processes")
    number = whole_number(values["process_id"], "process_id", where="--process-id", least=0)
    if number >= count:
        expected = f"0 to {count - 1}"
        hint = "number the processes from 0"
        raise InputError("no such process", where="--process-id", got=number, expected=expected, hint=hint)
    host, port = host_and_port(values["coordinator"])
    return Place(host, port, count, number, values.get("local_device_ids"))


def host_and_port(text: Any) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPv6]:PORT."""
    host, _, port = str(text).rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        hint = "give the address of process 0 and a port that is free there, such as node1:9876"
        raise InputError("not an address", where="--coordinator", got=text, expected="HOST:PORT", hint=hint)
    return host, int(port)


def _found() -> dict[str, Any]:
    """What the environment says; raises `InputError` if that is nothing."""
    found = _from_torchrun(os.environ) or _from_jax()
    if found is None:
        raise InputError(
            "nothing in the environment says which of several processes this is",
            where="--coordinator auto",
            expected=f"SLURM's, Open MPI's or Kubernetes' variables, or {', '.join(_TORCHRUN)}",
            hint="start the processes with srun, mpirun or torchrun, or give --coordinator HOST:PORT --processes N "
            "--process-id I",
        )
    return found


def _from_torchrun(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """From the variables that torchrun sets; its own store has the port itself, so the next one is taken."""
    if not all(environment.get(name) for name in _TORCHRUN):
        return None
    address, port, processes, process_id = (environment[name] for name in _TORCHRUN)
    numbers = {"MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": process_id}
    for name, value in numbers.items():
        if not value.isdecimal():
            hint = "correct the variable, or give --coordinator HOST:PORT"
            raise InputError("not a number", where=name, got=repr(value), hint=hint)
    used = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    found: dict[str, Any] = {"coordinator": f"{address}:{int(port) + used}"}
    found |= {"processes": int(processes), "process_id": int(process_id)}
    local, beside = environment.get("LOCAL_RANK", ""), environment.get("LOCAL_WORLD_SIZE", "1")
    if local.isdecimal() and beside != "1":
        found["local_device_ids"] = (int(local),)
    return found


def _from_jax() -> dict[str, Any] | None:
    """From SLURM, Open MPI or Kubernetes, as JAX reads their variables."""
    from jax._src import clusters

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    with warnings.catch_warnings(), _one_line():
        warnings.simplefilter("ignore")  # Kubernetes without its package is like no Kubernetes
        address, processes, process_id, devices = detect(None, None, None, None, None, 60)
    if address is None or processes is None or process_id is None:
        return None
    found = {"coordinator": address, "processes": processes, "process_id": process_id}
    given = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = [int(each) for each in given.split(",")] if given else None if _is_alone() else devices
    return found | {"local_device_ids": _tuple(devices)}


def _is_alone() -> bool:
    """Whether SLURM or Open MPI started one process on each machine: it has all the GPUs there."""
    counts = [os.environ.get(name, "") for name in _PROCESSES_OF_A_MACHINE]
    return any(re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", each) for each in counts)


def _tuple(devices: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if devices is None else tuple(devices)


@contextlib.contextmanager
def _one_line():
    """Makes an error of JAX about the environment one of ours."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        hint = "correct the environment, or give --coordinator HOST:PORT --processes N --process-id I"
        raise InputError(
            "the environment can't be read", where="--coordinator auto", got=str(error), hint=hint
        ) from error
