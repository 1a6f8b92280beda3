"""`polarjax eval perplexity`: what it scores of a text, and what it refuses to report."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import polarjax as pj
from polarjax.cli.main import main
from polarjax.evaluation import perplexity
from polarjax.text.tokenizer import Tokenizer
from tests.cli.test_generate import _model
from tests.model import zoo

ASSET = Path(pj.__file__).parent / "assets" / "opt-6m"


@pytest.fixture
def measure(tmp_path, capsys):
    """Runs the verb on a model and a text; the exit code, what was printed, and the errors."""

    def run(model: pj.Decoder, text: str, *words: str) -> tuple[object, str, str]:
        pj.save(tmp_path / "m", pj.Bundle(model, Tokenizer.load(ASSET)))
        (tmp_path / "t.txt").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as stopped:
            main(
                [
                    "eval",
                    "perplexity",
                    str(tmp_path / "m"),
                    "--text",
                    str(tmp_path / "t.txt"),
                    "--dense",
                    *words,
                ]
            )
        return stopped.value.code, *capsys.readouterr()

    return run


def test_bits_per_byte_count_each_byte_of_the_text_once(measure):
    model, tokenizer = _model(np.random.default_rng(0)), Tokenizer.load(ASSET)
    documents = ["深度学习模型的稀疏性", "a\n", "déjà vu "]
    rows = [tokenizer.hf.encode(each, add_special_tokens=False) for each in documents]
    stream = [tokenizer.bos_id, *rows[0], tokenizer.bos_id, *rows[1], tokenizer.bos_id, *rows[2]]
    length = len(stream)  # one window of the whole text
    text = "\f".join(documents)
    code, out, _ = measure(model, text, "--window", str(length), "--context", "0", "--json")
    found = json.loads(out)
    assert (code, found["windows"], found["scored_tokens"]) == (0, 1, sum(map(len, rows)))
    assert found["scored_bytes"] == sum(len(each.encode()) for each in documents)
    is_text = np.concatenate([np.arange(len(row) + 1) > 0 for row in rows])
    losses = perplexity(model, np.array([stream], np.int32)).token_nll[0]
    bits = losses[is_text[1:]].sum(dtype=np.float64) / math.log(2)
    assert found["dense"]["bits_per_byte"] == pytest.approx(bits / found["scored_bytes"], rel=1e-5)


def test_a_model_that_computes_nan_is_no_result(measure):
    model = zoo.with_rows(_model(np.random.default_rng(0)), "final_norm.bias", 0, np.nan)
    code, out, error = measure(model, "word " * 99, "--window", "16")
    assert (code, out) == (2, "")
    assert "the model computes NaN; got 90 of 90 scored tokens" in error.splitlines()[-1]
