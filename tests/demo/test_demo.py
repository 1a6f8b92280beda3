"""The demo: a small run writes what it promises, and the numbers that the product is judged by."""

import json

import pytest

import polarjax
from checkpoints_convert import convert_checkpoint
from polarjax.cli.demo import MODEL, demo
from polarjax.demo import DemoOptions, run
from polarjax.demo.report import compared, reading


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "model"
    convert_checkpoint(MODEL, folder)
    return run(folder, DemoOptions(measure=22, new_tokens=8, densities=(1.0, 0.75)))


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


def test_plans_reach_their_recall_on_other_text(results):
    assert [row["batch_size"] for row in results["plans"]] == [2**i for i in range(10)]
    assert min(min(row["recall"]) for row in results["plans"]) >= 0.985
    assert min(results["plans"][0]["density"]) < 0.5


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


def test_the_verb_writes_everything(tmp_path, capsys):
    demo(out=tmp_path / "out", quick=True)
    printed = capsys.readouterr().out
    assert str(tmp_path / "out") in printed.splitlines()[-1]
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert polarjax.load(tmp_path / "out" / "model").sparsity(8).plan.groups[0] is None
    assert len(saved["generation"]["sparse"]) == 8
    for name in ("perplexity.png", "neurons.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
