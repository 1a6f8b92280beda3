"""What the engine's programs hold on a GPU, read from what JAX hands to its compiler."""

import functools
import re
import time

import jax
import numpy as np
import pytest

import polarjax as pj
from polarjax.engine import programs, slots
from tests.model import zoo


def test_on_a_gpu_nothing_is_sorted():
    """A sort in a branch of a conditional, taken or not, makes a GPU wait for the host at every step."""
    model = jax.device_put(zoo.model("llama-gqa"), jax.devices()[0])
    with pj.Engine(pj.Bundle(model), slots=3, capacity=40) as engine:
        made, packer = engine._slots, engine._packer
        decode = jax.jit(functools.partial(slots.decode, steps=2, implementation="xla"))
        traced = [
            programs.read.trace(engine._model, made, packer.reading([], next(iter(packer.shapes)))),
            decode.trace(model, made, np.zeros(engine.slots, bool)),
        ]
    for program in traced:
        on_gpu, on_cpu = (program.lower(lowering_platforms=(each,)).as_text() for each in ("cuda", "cpu"))
        assert "top_k" in on_cpu, "the logarithms of probabilities are among what is compiled"
        assert not {"top_k", "sort"} & set(re.findall(r"\w+", on_gpu))


class Program:
    """A program whose compilation fails."""

    def __init__(self) -> None:
        self.begun = 0

    def lower(self, *_) -> "Program":
        return self

    def compile(self) -> None:
        self.begun += 1
        time.sleep(0.1)
        raise RuntimeError("interrupted")


def test_a_failure_or_signal_while_compiling_does_not_wait_for_the_rest(monkeypatch):
    program = Program()
    monkeypatch.setattr(programs, "read", program)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(RuntimeError, match="interrupted"):
        programs.compile_all(None, None, range(30), None, ())
    assert program.begun < 10
