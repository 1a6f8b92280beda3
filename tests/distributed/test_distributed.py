"""Many hosts: where a process finds its place, how processes meet and agree, and how they end together."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polarjax.distributed import places, start, wire
from polarjax.distributed.places import Place
from polarjax.errors import InputError
from tests.one_line import refuses

ROOT = Path(__file__).parents[2]
TORCHRUN = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-5]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
VERSIONS = {"polarjax": "1", "jax": "2"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; nothing else there says anything about processes."""
    for name in (
        *TORCHRUN,
        *SLURM,
        "SLURM_STEP_TASKS_PER_NODE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "KUBERNETES_SERVICE_HOST",
    ):
        monkeypatch.delenv(name, raising=False)
    return lambda given: [monkeypatch.setenv(*each) for each in given.items()]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, Place("node1", 29500, 4, 3)),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, Place("node1", 29501, 4, 3)),
        (TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place("node1", 29500, 4, 3, (1,))),
        (SLURM, Place("node3", 61447, 3, 1, (0,))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}, Place("node3", 61447, 3, 1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, Place("node3", 61447, 3, 1, (0,))),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, Place("node3", 61447, 3, 1, (0, 1))),
    ],
    ids=[
        "torchrun",
        "its store",
        "a process a GPU",
        "SLURM",
        "one a node",
        "some nodes two",
        "devices named",
    ],
)
def test_a_place_is_found_in_the_environment(environment, variables, expected):
    environment(variables)
    assert places.find() == expected
    assert places.find("auto", process_id=0).process_id == 0


def test_an_address_may_be_of_ipv6():
    assert places.find("[::1]:80", 2, 0) == Place("::1", 80, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("auto",), "nothing in the environment says"),
        (("node1:80", 2), "process_id is missing"),
        (("node1:80", None, 0), "processes is missing"),
        (("node1:80", 2, 2), "no such process; got 2, expected 0 to 1"),
        (("node1:80", 0, 0), "--processes: processes is not usable"),
        (("node1", 2, 0), "expected HOST:PORT"),
        (("node1:0", 2, 0), "expected HOST:PORT"),
        (("node1:x", 2, 0), "expected HOST:PORT"),
    ],
)
def test_places_that_cant_be_are_refused(environment, arguments, says):
    environment({})
    with refuses(InputError, says):
        places.find(*arguments)


@pytest.mark.parametrize("variables", [{"RANK": "x"}, {"MASTER_PORT": "99999"}])
def test_variables_that_cant_be_are_refused(environment, variables):
    environment(TORCHRUN | variables)
    with pytest.raises(InputError, match=r"RANK: not a number|expected HOST:PORT"):
        places.find()


def meet(*processes: tuple[int, int, dict], seconds: int = 20) -> list:
    """What each process, given by its number, the count and its versions, gets: a group, or an error."""
    port = wire.free_port("127.0.0.1")

    def one(process_id: int, count: int, versions: dict):
        try:
            return start._meet(Place("127.0.0.1", port, count, process_id), versions, 5, seconds)[0]
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return [each.result() for each in [pool.submit(one, *each) for each in processes]]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ((1, 2, VERSIONS | {"jax": "3"}), "the processes differ in their versions; .*jax 2; .*jax 3"),
        ((1, 3, VERSIONS), "the processes differ in how many they are; .*: 2; process 1 .*: 3"),
        (None, "process 1 did not come; got 1 of 2 processes in 1 s"),
    ],
    ids=["versions", "number", "missing"],
)
def test_processes_that_dont_fit_refuse_to_start(other, says):
    met = meet((0, 2, VERSIONS), *([other] if other else []), seconds=20 if other else 1)
    for each in met:
        assert isinstance(each, str) and "\n" not in each and ". Hint: " in each
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(each)
    assert len(set(met)) == 1


def test_two_processes_with_one_number_and_no_process_0_are_refused():
    met = meet((0, 3, VERSIONS), (1, 3, VERSIONS), (1, 3, VERSIONS))
    assert all("two processes have one number; got 1 on" in each for each in met)
    (alone,) = meet((1, 2, VERSIONS), seconds=1)
    assert "process 0 doesn't answer; got nothing in 1 s" in alone
    with socket.create_server(("127.0.0.1", 0)) as taken, refuses(InputError, "process 0 can't listen"):
        start._meet(Place("127.0.0.1", taken.getsockname()[1], 2, 0), VERSIONS, 5, 1)


def test_processes_agree_or_all_say_where_they_differ():
    groups = meet(*[(i, 3, VERSIONS) for i in range(3)])
    with ThreadPoolExecutor(3) as pool:
        run = lambda call: list(pool.map(call, groups))
        assert run(lambda each: each.agree({"their models": "a"}, hint="copy it")) == [None] * 3
        assert run(lambda each: each.broadcast([each.process_id])) == [[0]] * 3
        asked = [
            pool.submit(each.agree, {"size": 1, "their models": i // 2}, hint="copy it")
            for i, each in enumerate(groups)
        ]
        errors = [str(each.exception()) for each in asked]
    name = socket.gethostname()
    expected = f"the processes differ in their models; got process 0 ({name}): 0; process 2 ({name}): 1. Hint: copy it"
    assert errors == [f"many hosts: {expected}"] * 3
    for each in groups:
        each.leave()


def started_two(ending: str, **environment: str) -> list[subprocess.Popen]:
    """Two processes of four CPU devices each."""
    address = f"127.0.0.1:{wire.free_port('127.0.0.1')}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "tests.distributed.worker", address, "2"]
    env = os.environ | {"XLA_FLAGS": flags} | environment
    return [subprocess.Popen([*command, str(i), ending], cwd=ROOT, env=env, **pipes) for i in range(2)]


def run_two(ending: str) -> tuple[str, int, float]:
    """Starts two processes of four CPU devices each, of which one ends as asked; how the other ends, and how soon."""
    both = started_two(ending)
    first = both.pop(int(ending[0]))
    if ending.endswith("stops"):
        assert any(line == "stops now\n" for line in first.stdout)
    else:
        first.communicate(timeout=120)
    started = time.monotonic()
    out, err = both[0].communicate(timeout=120)
    first.kill()
    first.communicate()
    assert out.count("8 devices: 64\n") in (9, 10), (out, err)  # the last exchange may be cut off
    return err, both[0].returncode, time.monotonic() - started


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        ("1 killed", "polarjax: process 1 ({}) died\n"),
        ("0 killed", "polarjax: process 0 ({}) died\n"),
        ("1 stops", "polarjax: process 1 ({}) does not answer\n"),
    ],
)
def test_a_process_that_ends_early_ends_the_other(ending, says):
    err, code, seconds = run_two(ending)
    assert err == says.format(socket.gethostname())
    assert code == 1
    assert seconds < 40  # far below the five minutes that JAX itself would wait


def test_processes_put_groups_in_the_order_of_the_plans():
    """Programs that overlapped waited for each other for ever, if they had too few threads."""
    both = started_two("places", NPROC="2")  # few threads
    try:
        said = [each.communicate(timeout=60) for each in both]
    finally:
        for each in both:
            each.kill()
    assert [out.splitlines()[-1] for out, _ in said] == ["True"] * 2, said
