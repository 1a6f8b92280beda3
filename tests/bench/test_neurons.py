"""The measurement of neurons: masks are what decoding does, densities the model's, speeds the kernel table's."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import polarjax as pj
from bench.quality import neurons
from bench.quality.break_even import kernels, nearest_batch
from bench.quality.neuron_passes import Text, among_largest
from polarjax.evaluation import perplexity
from polarjax.text.tokenizer import Tokenizer
from tests.cli.homes import random_model
from tests.cli.test_evaluate import ASSET
from tests.model import zoo
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", ["llama-mha", "fatrelu-gated"])
def test_windows_that_share_neurons_lose_what_decoding_them_together_loses(name):
    model, routers = zoo.model(name), zoo.routers(name)
    config, windows = model.config, np.random.default_rng(0).integers(3, zoo.VOCAB, (4, 7)).astype(np.int32)
    plan = dataclasses.replace(zoo.half(config), groups=(None,) * config.num_layers)
    decoded = perplexity(
        model, windows, sparsity=pj.Sparsity(routers, plan), mode="decode", batch_size=2, context=0
    )
    found = Text(model, jnp.asarray(windows)).sparse(plan.neurons, 2, routers)
    assert_close(found, decoded.token_nll.mean(1), "rounding")


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_largest_are_found_bit_by_bit(k):
    values = np.abs(np.random.default_rng(k).normal(size=(5, 8))).astype(np.float32)
    values[0], values[1, :4] = 0, 0
    expected = values >= np.sort(values, -1)[:, [8 - k]]
    np.testing.assert_array_equal(among_largest(jnp.asarray(values), jnp.int32(k)), expected)


def test_one_command_measures_a_model_directory(tmp_path, capsys):
    model = random_model(np.random.default_rng(0))
    config = model.config
    pj.save(tmp_path / "m", pj.Bundle(model, Tokenizer.load(ASSET)))
    (tmp_path / "t.txt").write_text("one two three four five six seven " * 40, encoding="utf-8")
    words = [str(tmp_path / "m"), "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "o" / "n.jsonl")]
    words += ["--windows", "4", "--window", "8", "--batches", "1,8", "--perplexity-batches", "2"]
    assert neurons.main([*words, "--densities", "0.3,1"]) == 0
    assert "kernel table, batch 8" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "o" / "n.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} == {"m"} and rows[0]["windows"] == [4, 8]
    one, eight = (row for row in rows if row["kind"] == "neurons")
    assert len(one["union"]) == config.num_layers
    if config.neuron_sparsity:
        assert one["union"] == pytest.approx(one["natural"], abs=0.1)
        assert all(np.asarray(eight["union"]) >= one["natural"])
    some, every = (row for row in rows if row["kind"] == "perplexity")
    assert abs(every["increase"]) < 1e-5 and some["perplexity"] != every["perplexity"]
    assert neurons.main([*words, "--perplexity-batches", "3"]) == 1
    assert "expected a multiple of 3" in capsys.readouterr().err


def test_the_break_even_density_is_where_the_times_cross(tmp_path):
    table = tmp_path / "table.jsonl"
    times = [
        ("d1", "dense", 100),
        ("d0.1", "fused", 20),
        ("d0.3", "fused", 60),
        ("d0.3", "take+dot", 10),
        ("d0.5", "fused", 140),
    ]
    rows = [
        {"case": f"llama-2-7b B8 {density}", "kernel": kernel, "time_us": time}
        for density, kernel, time in times
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    (found,) = kernels(gated=True, path=table)
    assert found.break_even == pytest.approx(0.4, abs=1e-3)
    assert found.speedup(0.2) == pytest.approx(2.5) and found.speedup(0.05) is None
    assert (
        kernels(gated=False, path=table) == []
        and nearest_batch(3, [found]) == nearest_batch(64, [found]) == 8
    )
