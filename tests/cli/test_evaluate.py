"""`polarjax eval perplexity` and `agreement`: what they score of a text, and what they write."""

import errno
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

import polarjax as pj
from polarjax.cli.main import main
from polarjax.evaluation import perplexity
from polarjax.text.tokenizer import Tokenizer
from tests.cli.homes import random_model
from tests.model import zoo

ASSET = Path(pj.__file__).parent / "assets" / "opt-6m"


@pytest.fixture
def measure(tmp_path, capsys):
    """Runs a verb on a model and a text; the exit code, what was printed, and the errors."""

    def run(model: pj.Decoder, text: str, *words: str, verb: str = "perplexity") -> tuple[object, str, str]:
        pj.save(tmp_path / "m", pj.Bundle(model, Tokenizer.load(ASSET)))
        (tmp_path / "t.txt").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as stopped:
            main(["eval", verb, str(tmp_path / "m"), "--text", str(tmp_path / "t.txt"), *words])
        return stopped.value.code, *capsys.readouterr()

    return run


def test_bytes_and_words_of_the_text_count_once(measure):
    model, tokenizer = random_model(np.random.default_rng(0)), Tokenizer.load(ASSET)
    documents = ["深度学习模型的稀疏性", "a\n", "déjà vu "]
    rows = [tokenizer.hf.encode(each, add_special_tokens=False) for each in documents]
    stream = [tokenizer.bos_id, *rows[0], tokenizer.bos_id, *rows[1], tokenizer.bos_id, *rows[2]]
    length = len(stream)  # one window of the whole text
    text = "\f".join(documents)
    options = ("--dense", "--window", str(length), "--context", "0", "--json")
    code, out, _ = measure(model, text, *options)
    found = json.loads(out)
    scored = found["text"]
    assert (code, scored["windows"], scored["scored_tokens"]) == (0, 1, sum(map(len, rows)))
    assert scored["scored_bytes"] == sum(len(each.encode()) for each in documents)
    assert scored["scored_words"] == 4
    assert scored["texts"][0]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    losses = perplexity(model, np.array([stream], np.int32)).token_nll[0]
    is_text = np.concatenate([np.arange(len(row) + 1) > 0 for row in rows])
    nats = losses[is_text[1:]].sum(dtype=np.float64)
    (dense,) = found["dense"]
    assert dense["bits_per_byte"]["value"] == pytest.approx(
        nats / math.log(2) / scored["scored_bytes"], rel=1e-5
    )
    assert dense["perplexity"]["word"]["value"] == pytest.approx(math.exp(nats / 4), rel=1e-5)


def test_windows_that_overlap_score_no_more_than_was_asked_for(measure):
    words = "--dense --window 16 --stride 4 --max-tokens 40 --json".split()
    code, out, _ = measure(random_model(np.random.default_rng(0)), "word " * 99, *words)
    text = json.loads(out)["text"]
    # 15 of the first window, 4 of each other
    assert (code, text["windows"], text["scored_tokens"]) == (0, 7, 39)


@pytest.mark.parametrize(("verb", "shown"), [("perplexity", "bits/byte"), ("agreement", "same next token")])
def test_a_sweep_writes_its_report_and_picture(measure, tmp_path, verb, shown):
    (tmp_path / "other.txt").write_text("other " * 60)
    words = "--selectors oracle,static --neurons dense --densities .5 --protocols masked --window 16".split()
    outputs = ("--report", str(tmp_path / "r.json"), "--picture", str(tmp_path / "p.png"))
    other = ("--static-text", str(tmp_path / "other.txt"))
    code, out, _ = measure(
        random_model(np.random.default_rng(0)), "word " * 99, *words, *outputs, *other, verb=verb
    )
    assert code == 0
    assert shown in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert [row["selector"] for row in report["rows"]] == ["oracle", "static"]
    assert report["model"]["path"] == str(tmp_path / "m")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_printed_before_a_file_that_fails(measure, tmp_path, monkeypatch):
    monkeypatch.setattr("polarjax.evaluation.pictures.draw", full_disk)
    words = ("--dense", "--window", "16", "--picture", str(tmp_path / "p.png"))
    code, out, error = measure(random_model(np.random.default_rng(0)), "word " * 99, *words)
    assert code == 2 and "p.png: cannot write here; got No space left on device" in error
    assert "90 tokens scored" in out and "dense (masked): perplexity" in out


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_model_that_computes_nan_is_no_result(measure, tmp_path):
    model = zoo.with_rows(random_model(np.random.default_rng(0)), "final_norm.bias", 0, np.nan)
    code, out, error = measure(
        model, "word " * 99, "--dense", "--window", "16", "--report", str(tmp_path / "r.json")
    )
    assert (code, out) == (2, "")
    assert "the model computes NaN or infinity; got 90 of 90 scored tokens" in error.splitlines()[-1]
    assert not list(tmp_path.glob("*r.json*"))
