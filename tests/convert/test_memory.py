"""A large checkpoint on a small host: conversion under a limit that the system enforces."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.convert import big

MARGIN = 300_000_000

LIMITED = """if True:
    import json, resource, sys
    import jax
    from checkpoints_convert import convert_checkpoint

    def status(key):
        line = next(line for line in open("/proc/self/status") if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024

    source, target, allowed = sys.argv[1:]
    jax.local_devices()  # its threads reserve address space that they never use
    before = status("VmHWM")
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + int(allowed),) * 2)
    done = convert_checkpoint(source, target)
    print(json.dumps({"before": before, "peak": status("VmHWM"), "bytes": done.num_bytes}))
"""

ONTO_MESH = """if True:
    import json, sys
    import jax
    import polarjax as pj
    from polarjax import costs
    from polarjax.model.mesh_shape import MeshShape

    def status(key):
        line = next(line for line in open("/proc/self/status") if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024

    mesh = jax.make_mesh((8,), ("model",))
    jax.block_until_ready(jax.device_put(0))
    before = status("VmHWM")
    model = pj.load(sys.argv[1], mesh=mesh).model
    parts = [part for leaf in jax.tree.leaves(model) for part in leaf.addressable_shards]
    held = {str(device): 0 for device in mesh.devices.flat}
    for part in parts:
        held[str(part.device)] += part.data.nbytes
    expected = costs.weights_bytes(model.config, mesh=MeshShape(model=8))
    print(json.dumps({"grown": status("VmHWM") - before, "held": list(held.values()), "expected": expected}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that is removed at once, because it holds gigabytes."""
    folder = tmp_path_factory.mktemp("big")
    yield folder
    shutil.rmtree(folder)


def test_fault_28_a_checkpoint_in_three_tensors_of_memory(place):
    """Above JAX just started: below 3 x the largest tensor + 300 MB; the data segment cannot grow by more."""
    total, largest = big.write(place / "hf", layers=8)
    assert total > 1.8 * (3 * largest + MARGIN)
    allowed = 3 * largest + MARGIN
    command = [sys.executable, "-c", LIMITED, place / "hf", place / "model", str(allowed)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    print(told, "allowed", allowed)
    assert told["bytes"] == total
    assert told["peak"] - told["before"] < allowed


def test_onto_a_mesh_with_little_beside_the_shards(place):
    """The devices' own memory is this process's; nothing in the environment helps."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", ONTO_MESH, place / "model"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["held"] == [found["expected"]] * 8
    assert found["grown"] - sum(found["held"]) < MARGIN < sum(found["held"])
