"""Learning is fitted to the device's memory before it starts, or refused in one line."""

import dataclasses

import pytest

import polarjax as pj
from polarjax import memory
from polarjax.sparsity import footprint
from polarjax.sparsity.activations import part_of
from polarjax.sparsity.collection import plan_recording
from polarjax.sparsity.options import CalibrateOptions, CollectOptions, TrainOptions
from tests.model import zoo
from tests.one_line import refuses

MODEL, SHAPE = zoo.model("opt"), (40, 12)
TRAINING, CALIBRATION = TrainOptions(), CalibrateOptions(batch_sizes=(1, 2))


@pytest.fixture(autouse=True)
def _nothing_else_is_held(monkeypatch):
    """What other tests of this process keep on the device would count, too."""
    monkeypatch.setattr(memory, "held_bytes", lambda: 0)


def limited(monkeypatch, most: int) -> None:
    for module in (memory, footprint):
        monkeypatch.setattr(module, "device_memory", lambda: most)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")


def planned(options: CollectOptions):
    recording = plan_recording(MODEL, SHAPE, options, in_parts=options.folder is None)
    return footprint.planned(MODEL, SHAPE, recording, options, TRAINING, CALIBRATION)


def test_batches_get_smaller_until_they_fit(monkeypatch):
    recording = plan_recording(MODEL, SHAPE, CollectOptions())
    two, one = (footprint.collecting_memory(MODEL, 12, recording, size)["total"] for size in (2, 1))
    assert one < two
    limited(monkeypatch, (one + two) // 2)
    assert footprint.collecting_batch(MODEL, SHAPE, recording, 2)[0] == 1
    limited(monkeypatch, 1000)
    with refuses(pj.InputError, r"collecting does not fit the device's memory; got 0.00 GB.*--window"):
        footprint.collecting_batch(MODEL, SHAPE, recording, 2)


def test_fewer_layers_are_trained_at_a_time_until_they_fit(monkeypatch, tmp_path):
    tokens = int((plan_recording(MODEL, SHAPE, CollectOptions()).part == 0).sum())
    configs = (part_of(MODEL.config, range(count)) for count in (2, 1))
    two, one = (footprint.training_memory(each, "float32", tokens, TRAINING)["total"] for each in configs)
    assert one < two
    monkeypatch.setattr(footprint, "collecting_batch", lambda *_: (4, {"total": 0}))
    monkeypatch.setattr(footprint, "calibrating_memory", lambda *_, **__: None)
    limited(monkeypatch, two)
    assert planned(CollectOptions())[0].parts == (range(2),)
    limited(monkeypatch, (one + two) // 2)
    recording, options = planned(CollectOptions())
    assert recording.parts == (range(1), range(1, 2)) and options.batch_size == 4
    with refuses(pj.InputError, r"training routers does not fit the device's memory.*drop --activations"):
        planned(dataclasses.replace(CollectOptions(), folder=tmp_path / "acts"))


@pytest.mark.parametrize(("needed", "hinted"), [(110, True), (130, False)])
def test_jax_is_given_more_of_the_device_where_that_is_enough(monkeypatch, needed, hinted):
    limited(monkeypatch, 100)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert (memory.fraction_hint(needed) is not None) == hinted
