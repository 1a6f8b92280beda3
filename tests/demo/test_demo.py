"""The demo: a small run writes what it promises, and the numbers that the product is judged by."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import polarjax
from polarjax.demo.report import compared, reading

ROOT = Path(__file__).parents[2]
SMALLER = """if True:
    import sys
    from polarjax import demo
    from polarjax.cli.demo import demo as verb
    options = demo.DemoOptions(measure=22, epochs=3, new_tokens=8, densities=(1.0, 0.75))
    run = demo.run
    demo.run = lambda folder, _: run(folder, options)
    verb(out=sys.argv[1])
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that the verb wrote, and what it printed; compiled as for users, but only slightly optimized."""
    out = tmp_path_factory.mktemp("demo") / "out"
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=1"}
    del environment["NPROC"]  # more threads than processors cost time
    command = [sys.executable, "-c", SMALLER, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


@pytest.fixture(scope="module")
def results(ran):
    return json.loads((ran[0] / "results.json").read_text())


def test_routers_avoid_most_of_what_random_selection_costs(results):
    density, rise = compared(results["quality"])
    assert density == 0.75
    assert rise["random"] >= 0.2
    assert rise["router"] <= rise["random"] / 3
    assert rise["router"] <= 1.5 * rise["oracle"] + 0.01


def test_dense_layer_and_predicted_norms_improve_quality(results):
    quality = results["quality"]
    published = next(row for row in quality["rows"] if row["density"] == 0.75)
    (row,) = quality["important_rows"]
    assert quality["important_layer"] == 1 and row["density"] == 0.75
    cost = {name: value / quality["dense"] - 1 for name, value in row.items()}
    assert cost["oracle"] < cost["router"] < cost["static"]
    assert row["router"] < published["router"]


def test_healing_makes_skipping_cheap_and_keeps_the_dense_model(results):
    quality = results["quality"]
    (before,), (after,) = quality["important_rows"], quality["healed"]["rows"]
    assert quality["healed"]["dense"] < 1.03 * quality["dense"]
    assert after["router"] / quality["dense"] - 1 < (before["router"] / quality["dense"] - 1) / 2


def test_plans_reach_their_recall_on_other_text(results):
    assert [row["batch_size"] for row in results["plans"]] == [2**i for i in range(10)]
    assert min(min(row["recall"]) for row in results["plans"]) >= 0.985
    assert np.mean(results["plans"][0]["density"]) < 0.5


def test_routers_learn_which_groups_matter(results):
    """At head density 0.75 chance finds three quarters of them."""
    found = results["learning"]["training"]["groups"]["selected"]
    assert np.mean(found) > 0.85


def test_density_one_is_dense(results):
    assert results["generation"]["density_1_equals_dense"]
    full = results["quality"]["rows"][0]
    assert {name: full[name] for name in ("router", "oracle", "random", "static")} == pytest.approx(
        dict.fromkeys(("router", "oracle", "random", "static"), results["quality"]["dense"]), rel=1e-5
    )


def test_sparse_decoding_touches_fewer_bytes(results):
    assert all(row["sparse"] < row["dense"] for row in results["costs"])


def test_reading_says_what_the_numbers_say(results):
    lines = " ".join(reading(results))
    density, rise = compared(results["quality"])
    assert f"density {density:g}" in lines
    assert f"router {rise['router']:+.1%}" in lines
    flat = {"dense": 10.0, "rows": [{"density": 1.0, "router": 10.0, "random": 11.0}]}
    assert compared(flat) is None


def test_the_verb_writes_everything(ran, results):
    out, printed = ran
    assert str(out) in printed.splitlines()[-1]
    assert polarjax.load(out / "model").sparsity(8).plan.groups[0] is None
    assert len(results["generation"]["sparse"]) == 8
    for name in ("perplexity.png", "neurons.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
