"""Processes of many hosts refuse to start with different models or meshes."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import polarjax as pj
from polarjax.checkpoint import same_model
from polarjax.checkpoint.manifest import read_manifest
from tests.cli.homes import make_home, random_model
from tests.distributed.test_distributed import VERSIONS, meet


@pytest.fixture
def both(monkeypatch):
    """Calls a function as several processes, with an argument each; what it raises in each, as text."""
    local = threading.local()
    monkeypatch.setattr(same_model, "group", lambda: getattr(local, "group", None))

    def call(function, *arguments) -> list[str]:

        def one(group, argument) -> str:
            local.group = group
            try:
                function(argument)
            except pj.InputError as error:
                return str(error)
            return ""

        groups = meet(*[(i, len(arguments), VERSIONS) for i in range(len(arguments))])
        with ThreadPoolExecutor(len(arguments)) as pool:
            found = list(pool.map(one, groups, arguments))
        for each in groups:
            each.leave()
        return found

    return call


def change_tokenizer(folder):
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ x }}")


def change_weights(folder):
    pj.save(
        folder, pj.Bundle(random_model(np.random.default_rng(1)), pj.load(folder).tokenizer), overwrite=True
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: None, ""),
        (change_tokenizer, "their tokenizers"),
        (change_weights, "their models"),
        (lambda folder: (folder / "plans.json").write_text("{}"), "their plans"),
    ],
)
def test_models_are_compared_before_they_are_read(both, tmp_path, change, what):
    one = make_home(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(one, other)
    change(other)
    found = both(lambda folder: same_model.agree_on_model(folder, read_manifest(folder)), one, other)
    assert len(set(found)) == 1
    assert found[0].startswith(f"many hosts: the processes differ in {what}; got process 0 (" if what else "")
    assert bool(found[0]) == bool(what)


def mesh(data: int, model: int, *owners: int):
    devices = np.array([SimpleNamespace(process_index=owner, id=owner) for owner in owners], object)
    return SimpleNamespace(shape={"data": data, "model": model}, devices=devices)


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (mesh(1, 2, 0, 1), mesh(1, 2, 0, 1), ""),
        (mesh(1, 2, 0, 0), mesh(1, 2, 1, 1), ""),  # each has a replica
        (mesh(1, 2, 0, 1), mesh(2, 1, 0, 1), "their meshes"),
        (mesh(1, 2, 0, 1), mesh(1, 2, 1, 0), "the order of their devices"),
        (mesh(1, 2, 0, 0), mesh(1, 2, 0, 0), "their meshes"),
    ],
)
def test_meshes_are_compared(both, first, second, what):
    found = both(lambda each: same_model.agree_on_mesh(each, "groups"), first, second)
    assert len(set(found)) == 1
    assert bool(found[0]) == bool(what)
    assert what in found[0] and ("of all" in found[0]) == bool(what)


def test_a_mesh_has_devices_of_all_processes(both):
    found = both(lambda each: same_model.agree_on_mesh(each, "groups"), *[mesh(1, 2, 0, 1)] * 3)
    says = "mesh: the mesh leaves out some processes; got devices of processes [0, 1] of 3. Hint: use all"
    assert all(each.startswith(says) for each in found)
