"""The verb `polarjax convert`."""

import json

import pytest

import polarjax as pj
from polarjax.cli.main import main
from tests.convert import hf_models


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    hf_models.save("opt", folder)
    return folder


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def test_converts(source, tmp_path, capsys):
    code, out, err = run(capsys, "convert", source, tmp_path / "out")
    assert code == 0
    assert out.startswith("opt: 52 tensors, ")
    assert out.endswith(f"float32, no tokenizer, {out.split()[-4]} s -> {tmp_path / 'out'}\n")
    assert "converting: 1/1 MB" in err
    assert pj.load(tmp_path / "out").model_type == "opt"


def test_json(source, tmp_path, capsys):
    code, out, _ = run(capsys, "convert", source, tmp_path / "out", "--json", "--dtype", "bfloat16")
    assert code == 0
    told = json.loads(out)
    assert (told["model_type"], told["dtype"], told["tensors"]) == ("opt", "bfloat16", 52)
    assert pj.ModelConfig.from_json(told["config"]) == pj.load(tmp_path / "out").model.config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int8"], "--dtype"),
        (["--nothing"], "No such option"),
    ],
)
def test_bad_options(source, tmp_path, capsys, options, words):
    code, _, err = run(capsys, "convert", source, tmp_path / "out", *options)
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(source, tmp_path, capsys):
    code, out, err = run(capsys, "convert", tmp_path / "nothing", tmp_path / "out")
    assert (code, out) == (2, "")
    assert (
        err
        == f"polarjax: {tmp_path / 'nothing'}: no such folder. Hint: give the folder of a HuggingFace model\n"
    )
