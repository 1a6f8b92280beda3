"""Routers and plans belong to the weights, and plans to the routers, that they were made for."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from polarjax.checkpoint.learned import write_plans, write_routers
from polarjax.checkpoint.loading import load_to_learn
from polarjax.model.parameters import fingerprint, parameters
from polarjax.selection.routers import init_routers
from polarjax.storage import fingerprint as fingerprints
from polarjax.storage.fingerprint import fingerprint_of, same_weights
from polarjax.types import DTYPES
from tests.checkpoint.test_checkpoint import assert_same, full_bundle, plans_for, refused, saved
from tests.model import zoo

__all__ = ["saved"]  # the fixture


def tuned(model: pj.Decoder) -> pj.Decoder:
    """The model after a training step that changed one value of one parameter."""
    name = "layers.1.mlp.w_down"
    value = parameters(model)[name]
    return zoo.with_parameter(model, name, value.at[17, 5].add(0.25))


def learned(model: pj.Decoder, seed: int) -> pj.Bundle:
    """Routers and plans that know the model that they were made for."""
    routers = init_routers(model.config, jax.random.key(seed), rank=4)
    routers = dataclasses.replace(routers, weights=fingerprint(model))
    marks = {"weights": fingerprint(model), "routers": routers.fingerprint}
    return pj.Bundle(model, routers=routers, plans=dataclasses.replace(plans_for(model.config), **marks))


def without_fingerprints(folder: Path) -> None:
    """The directory as earlier versions wrote it."""
    for file, names in (
        ("manifest.json", ["fingerprint"]),
        ("routers/manifest.json", ["weights", "fingerprint"]),
        ("plans.json", ["weights", "routers"]),
    ):
        data = json.loads((folder / file).read_text())
        assert all(name in data for name in names)
        (folder / file).write_text(json.dumps({key: data[key] for key in data if key not in names}))


@pytest.mark.parametrize("origin", ["trained", "unmarked", "loaded", "loaded from an earlier version"])
def test_routers_and_plans_of_other_weights_are_not_used_and_not_saved(tmp_path, origin):
    bundle = full_bundle() if origin == "unmarked" else learned(zoo.model("opt"), 3)
    if origin.startswith("loaded"):
        pj.save(tmp_path / "model", bundle)
        if "earlier" in origin:
            without_fingerprints(tmp_path / "model")
        bundle = pj.load(tmp_path / "model")
    bundle.sparsity(1)
    other = tuned(bundle.model)
    new = dataclasses.replace(bundle, model=other)
    for act in (lambda: new.sparsity(1), lambda: pj.save(tmp_path / "new", new)):
        with pytest.raises(
            pj.SparsityError, match=r"the routers are not for this model.*with_model"
        ) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(pj.SparsityError, match="plans are not for this model"):
        dataclasses.replace(learned(other, 3), plans=learned(zoo.model("opt"), 3).plans).sparsity(1)
    dropped = bundle.with_model(other)
    assert (dropped.routers, dropped.plans) == (None, None)
    kept = bundle.with_model(other, keep_sparsity=True)
    pj.save(tmp_path / "new", kept)
    found = pj.load(tmp_path / "new")
    assert found.sparsity(3).plan == bundle.sparsity(3).plan
    assert_same(found.model, other)


def test_parts_of_two_trainings_do_not_stand_side_by_side(saved):
    one, two = (learned(zoo.model("opt"), seed) for seed in (1, 2))
    write_routers(saved, one.routers)
    with pytest.raises(
        pj.SparsityError, match=r"plans.json: the plans were calibrated for other routers.*Hint"
    ):
        write_plans(saved, two.plans)
    write_plans(saved, one.plans)
    (saved / "plans.json").write_text(json.dumps(two.plans.to_json()))
    refused(saved, "plans.json", "for other routers", "polarjax calibrate", error=pj.SparsityError)
    with pytest.raises(pj.SparsityError, match="for other routers"):
        dataclasses.replace(one, plans=two.plans).sparsity(1)
    foreign = learned(tuned(zoo.model("opt")), 1)
    for write, part in ((write_routers, foreign.routers), (write_plans, foreign.plans)):
        with pytest.raises(pj.SparsityError, match="are not for this model"):
            write(saved, part)
    assert_same(load_to_learn(saved, routers=True).routers, one.routers)


@pytest.mark.parametrize("stored", zoo.DTYPES)
@pytest.mark.parametrize("trained", DTYPES)
def test_a_cast_of_the_model_is_the_same_model(tmp_path, stored, trained):
    pj.save(tmp_path / "m", pj.Bundle(zoo.model("opt", stored)))
    parts = learned(load_to_learn(tmp_path / "m", dtype=trained).model, 1)
    write_routers(tmp_path / "m", parts.routers)
    write_plans(tmp_path / "m", parts.plans)
    for dtype in (None, *DTYPES):
        pj.load(tmp_path / "m", dtype=dtype).sparsity(1)


@pytest.mark.parametrize("shape", [(), (7,), (2048,), (2049,), (3, 5000), (1, 300, 40)])
def test_a_fingerprint_sees_the_first_and_the_last_value_and_all_of_a_small_array(shape, monkeypatch):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    known, flat = fingerprint_of({"a": array}), array.reshape(-1)
    assert fingerprint_of({"a": jnp.asarray(array)}) == known
    with monkeypatch.context() as patched:
        patched.setattr(fingerprints, "_gather_on_host", fingerprints._gather)  # as on an accelerator
        assert fingerprint_of({"a": jnp.asarray(array)}) == known
    for place in {0, flat.size - 1, *(range(0, flat.size, 100) if flat.size <= 2048 else [])}:
        changed = flat.copy()
        changed[place] += 1
        assert not same_weights(fingerprint_of({"a": changed.reshape(shape)}), known)
    assert same_weights("", known) and same_weights("0" * 64, known)
