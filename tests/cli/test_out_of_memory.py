"""Fault 28 on devices: where their memory runs out, one line tells what needs how much and what would fit."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.errors import JaxRuntimeError

import polarjax as pj
from polarjax import memory
from polarjax.cli import generating
from polarjax.model.mesh_shape import MeshShape
from polarjax.model.parameters import abstract, parameters, with_parameters
from polarjax.storage import array_reader
from polarjax.text import continuation
from polarjax.text.tokenizer import Tokenizer
from tests.convert.test_convert_cli import run
from tests.model import zoo
from tests.one_line import refuses

FULL = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")
LIMITED = """if True:
    import resource, sys
    import jax
    from polarjax.cli.main import main
    jax.local_devices()
    used = next(line for line in open("/proc/self/status") if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(used.split()[1]) * 1024 + 1_500_000_000,) * 2)
    main(sys.argv[1:])
"""


def fail(*_, **__):
    raise FULL


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model directory: random, with a tokenizer."""
    folder = tmp_path_factory.mktemp("home")
    config = dataclasses.replace(zoo.CONFIGS["opt"], vocab_size=4096, max_positions=64)
    draw = np.random.default_rng(0).normal
    flat = {
        name: draw(size=leaf.shape).astype(np.float32) for name, leaf in parameters(abstract(config)).items()
    }
    tokenizer = Tokenizer.load(Path(pj.__file__).parent / "assets" / "opt-6m")
    pj.save(folder / "model", pj.Bundle(with_parameters(config, flat), tokenizer))
    return folder / "model"


def test_fault_28_the_memory_really_runs_out(home):
    words = ["generate", home, "--prompt", "def f", "--temperature", "1", "--num-return-sequences", "60000"]
    command = [sys.executable, "-c", LIMITED, *map(str, words), "--max-new-tokens", "40"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("polarjax: 60,000 sequences of up to 64 positions: the device ran out of memory")
    assert "1.97 GB of cache" in last and "try 30,000 sequences" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [(), ("--stop", "never")], ids=["at once", "in chunks"])
def test_fault_28_largest_fitting_batch_is_reported(home, capsys, monkeypatch, words):
    for name in ("generate", "stream"):
        monkeypatch.setattr(continuation, name, fail)
    prompts = ("--prompt", "a", "--prompt", "b", "--prompt", "c", "--max-new-tokens", "12")
    told = lambda: run(capsys, "generate", home, *prompts, *words)
    monkeypatch.setattr(memory, "device_memory", lambda: 525_000)
    code, _, err = told()
    assert code == 2
    assert "3 sequences of up to 32 positions: the device ran out of memory" in err
    assert "and temporaries in 0.00 GB, expected at most 2 such sequences" in err
    monkeypatch.setattr(memory, "device_memory", lambda: 1000)
    assert "expected at most 0 such sequences. Hint: shorten the texts, or use a narrower dtype" in told()[2]


def test_on_a_mesh_sizes_are_those_of_a_device(monkeypatch):
    config, mesh = dataclasses.replace(zoo.CONFIGS["opt"], vocab_size=62), MeshShape(data=2, model=2)
    weights = pj.costs.weights_bytes(config, "float32", mesh=mesh)
    each = 1000 * pj.costs.cache_bytes_per_token(config, "float32") // 2 + 4 * 31
    monkeypatch.setattr(memory, "device_memory", lambda: weights + 300_000 * each)
    sizes = {"batch_size": 800_000, "cache_length": 1000, "dtype": "float32", "mesh": mesh}
    used = f"on each of 4 devices {weights / 1e9:.2f} GB of weights, {400_000 * (each - 124) / 1e9:,.2f} GB of cache"
    with (
        refuses(pj.InputError, f"a device ran out of memory; got {used}.*try 600,000 sequences"),
        memory.explained_out_of_memory(config, **sizes),
    ):
        fail()


def test_every_verb_tells_it_in_one_line(home, capsys, monkeypatch):
    monkeypatch.setattr(generating, "load_with_tokenizer", fail)
    code, out, err = run(capsys, "generate", home, "--prompt", "a")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("polarjax: the device ran out of memory. Hint: ")


def test_other_errors_of_jax_are_not_hidden():
    sizes = {"batch_size": 1, "cache_length": 8, "dtype": "float32"}
    with (
        pytest.raises(JaxRuntimeError, match="INTERNAL"),
        memory.explained_out_of_memory(zoo.CONFIGS["opt"], **sizes),
    ):
        raise JaxRuntimeError("INTERNAL: another one")


def test_parameters_that_do_not_fit(home, monkeypatch):
    monkeypatch.setattr(array_reader.jax, "make_array_from_single_device_arrays", fail)
    with refuses(pj.CheckpointError, "params: the device has too little memory.*polarjax inspect"):
        pj.load(home)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_parameters_that_do_not_fit_the_host(home, monkeypatch, error):
    def empty(*_):
        raise error

    monkeypatch.setattr(array_reader, "_empty", empty)
    with refuses(pj.CheckpointError, "params: the machine has too little memory.*Hint: free some memory"):
        pj.load(home)
