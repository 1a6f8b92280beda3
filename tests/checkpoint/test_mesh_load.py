"""`pj.load` onto a mesh of eight devices: every device gets its own parts, the same values as on one device."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import polarjax as pj
from polarjax import costs
from polarjax.model.layout import ROUTER_AXES
from polarjax.model.mesh_shape import MeshShape
from polarjax.model.parameters import fingerprint, parameters
from polarjax.selection.routers import init_routers
from tests.model import zoo
from tests.several_devices import printed

DEVICES = 8
CONFIG = dataclasses.replace(zoo.CONFIGS["opt"], vocab_size=64, d_ff=64)
WAYS = {
    "tensors": (((8,), ("model",)), {}),
    "both": (((2, 4), ("data", "model")), {}),
    "data": (((8, 1), ("data", "model")), {}),
    "sequences": (((2, 2), ("data", "model")), {"attention": "sequences"}),
    "rules": (((2,), ("model",)), {"rules": {"vocab": None, "neurons": None}}),
}


def bundle() -> pj.Bundle:
    config = dataclasses.replace(CONFIG, num_heads=8, num_kv_heads=8)
    routers = init_routers(config, jax.random.key(1))
    return pj.Bundle(pj.Decoder(config, rngs=nnx.Rngs(0)), routers=routers)


def faults_of(folder: str, way: str) -> list[str]:
    """What is wrong with the model directory loaded in one of `WAYS`."""
    (sizes, names), how = WAYS[way]
    alone, mesh = pj.load(folder), jax.make_mesh(sizes, names)
    found = pj.load(folder, mesh=mesh, **how)
    made, config = found.model, found.model.config
    faults = [] if made.layout.attention == how.get("attention", "groups") else ["attention"]
    pairs = zip(parameters(alone.model).items(), parameters(made).values(), strict=True)
    faults += [name for (name, one), many in pairs if not np.array_equal(one, many)]
    routers = zip(alone.routers.parameters().items(), found.routers.parameters().values(), strict=True)
    faults += [name for (name, one), many in routers if not np.array_equal(one, many)]
    shape = MeshShape(**dict(zip(names, sizes, strict=True)))
    held = {
        sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(made)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        for device in mesh.devices.flat
    }
    if "rules" not in how and held != {costs.weights_bytes(config, "float32", mesh=shape)}:
        faults.append(f"{held} bytes a device")
    faults += [] if fingerprint(made) == fingerprint(alone.model) else ["fingerprint"]
    for name, axes in ROUTER_AXES.items():
        if (array := getattr(found.routers.layers[0], name)) is not None:
            cut = [axis for axis, size in zip(axes, array.sharding.spec, strict=False) if size is not None]
            divided = {"groups", "neurons"} - ({"groups"} if "attention" in how else set())
            divided -= {axis for axis, rule in how.get("rules", {}).items() if rule is None}
            faults += [] if set(cut) == divided & set(axes) else [f"{name} cut along {cut}"]
    return faults


def refusals_of(folder: str) -> list[str]:
    """Messages for meshes that don't fit; nothing is read for them, since the files are gone."""
    mesh = lambda size, name="model": jax.make_mesh((size,), (name,), devices=jax.devices()[:size])
    wrong = [{"mesh": mesh(3)}, {"mesh": mesh(2, "x")}, {"attention": "groups"}, {"mesh": 4}]
    wrong += [{"mesh": mesh(2), "rules": {"heads": "model"}}, {"mesh": mesh(2), "attention": "all"}]
    messages = []
    for how in wrong:
        try:
            pj.load(folder, **how)
        except pj.PolarjaxError as error:
            messages.append(str(error))
    return messages


def in_child(code: str) -> dict:
    code = f"import json; from tests.checkpoint import test_mesh_load as test; print(json.dumps({code}))"
    return json.loads(printed(code, DEVICES).splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    whole, gone = (tmp_path_factory.mktemp("mesh") / name for name in ("whole", "gone"))
    pj.save(whole, bundle())
    shutil.copytree(whole, gone)
    for file in (gone / "params").rglob("*"):
        file.unlink() if file.is_file() else None
    faults = f"{{way: test.faults_of({str(whole)!r}, way) for way in test.WAYS}}"
    return in_child(f"{{'faults': {faults}, 'refusals': test.refusals_of({str(gone)!r})}}")


@pytest.mark.parametrize("way", WAYS)
def test_every_device_gets_its_parts(found, way):
    assert found["faults"][way] == []


def test_what_does_not_fit_is_refused_before_reading(found):
    messages = found["refusals"]
    expected = ["8 KV heads (groups) can't be divided", "the mesh has an axis 'x'", "attention needs a mesh"]
    expected += [
        "not a mesh of devices",
        "parameters have no axis 'heads'",
        "no such way to divide attention",
    ]
    assert len(messages) == len(expected)
    for message, part in zip(messages, expected, strict=True):
        assert part in message and "\n" not in message and ". Hint: " in message


@pytest.mark.parametrize("way", ["rules", "attention"])
def test_a_way_without_a_mesh(tmp_path, way):
    with pytest.raises(pj.InputError, match=f"{way} needs a mesh"):
        pj.load(tmp_path, **{way: "groups"})
