"""What a user can get wrong, walked through the command: one line on standard error, exit 2, nothing written."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from polarjax.checkpoint.learned import write_plans, write_routers
from polarjax.cli.main import main
from polarjax.selection.routers import init_routers

ASSETS = Path(pj.__file__).parent / "assets"
HEADER = "model.safetensors"


def plan_table(config: pj.ModelConfig, **changes) -> pj.PlanTable:
    row, perfect = (config.d_ff // 2,) * config.num_layers, (1.0,) * config.num_layers
    made = pj.PlanTable(
        num_layers=config.num_layers,
        num_neurons=config.d_ff,
        num_groups=config.num_kv_heads,
        batch_sizes=(1, 8),
        neurons=(row, row),
        recall=(perfect, perfect),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A converted model with routers and plans, another without, the same one's HF folder, and texts."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ASSETS / "opt-6m", home / "hf")
    convert_checkpoint(home / "hf", home / "plain")
    shutil.copytree(home / "plain", home / "model")
    config = pj.load(home / "plain").model.config
    write_routers(home / "model", init_routers(config, jax.random.key(0)))
    write_plans(home / "model", plan_table(config))
    (home / "short.txt").write_text("Too short to learn from.\n", encoding="utf-8")
    (home / "long.txt").write_text("word " * 200, encoding="utf-8")
    (home / "latin.txt").write_bytes("na\xefve".encode("latin-1") * 50)
    (home / "empty.txt").write_text("", encoding="utf-8")
    return home


def spoil_truncated(home: Path) -> None:
    weights = (home / "hf" / HEADER).read_bytes()
    (home / "hf" / HEADER).write_bytes(weights[: len(weights) // 2])


def spoil_model_type(home: Path) -> None:
    file = home / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gpt2"}))


def swap_plans(home: Path) -> None:
    config = dataclasses.replace(pj.load(home / "plain").model.config, num_layers=3)
    (home / "model" / "plans.json").write_text(json.dumps(plan_table(config).to_json()))


def swap_routers(home: Path) -> None:
    """Puts the routers of a converted LLaMA into the OPT model's directory."""
    convert_checkpoint(ASSETS / "llama-6m", home / "llama")
    write_routers(home / "llama", init_routers(pj.load(home / "llama").model.config, jax.random.key(0)))
    shutil.rmtree(home / "model" / "routers")
    shutil.copytree(home / "llama" / "routers", home / "model" / "routers")


CASES = {
    "a folder that is not there": (None, ("convert", "nowhere", "out"), "nowhere"),
    "a folder without weights": (
        lambda home: (home / "hf" / HEADER).unlink(),
        ("convert", "hf", "out"),
        "safetensors",
    ),
    "a truncated checkpoint": (spoil_truncated, ("convert", "hf", "out"), HEADER),
    "a family that is not supported": (spoil_model_type, ("convert", "hf", "out"), "gpt2"),
    "a config that is no JSON": (
        lambda home: (home / "hf" / "config.json").write_text("{"),
        ("convert", "hf", "out"),
        "config.json",
    ),
    "an HF folder where a model directory belongs": (None, ("generate", "hf", "--prompt", "a"), "convert"),
    "a truncated model directory": (
        lambda home: shutil.rmtree(home / "model" / "params"),
        ("generate", "model", "--prompt", "a"),
        "params",
    ),
    "a text too short to train on": (
        None,
        ("sparsify", "plain", "--text", "short.txt"),
        "the text is too short",
    ),
    "an empty text": (None, ("sparsify", "plain", "--text", "empty.txt"), "the text is empty"),
    "a text that is not there": (None, ("sparsify", "plain", "--text", "no.txt"), "no.txt"),
    "a text in another encoding": (None, ("sparsify", "plain", "--text", "latin.txt"), "UTF-8"),
    "density 0": (
        None,
        ("generate", "model", "--prompt", "a", "--head-density", "0"),
        "above 0 and at most 1",
    ),
    "density above 1": (
        None,
        ("generate", "model", "--prompt", "a", "--head-density", "1.5"),
        "above 0 and at most 1",
    ),
    "density for a model without routers": (
        None,
        ("generate", "plain", "--prompt", "a", "--head-density", "0.5"),
        "sparsify",
    ),
    "a prompt longer than the model's positions": (
        None,
        ("generate", "model", "--prompt", "word " * 2000),
        "exceed the model's positions",
    ),
    "more new tokens than positions": (
        None,
        ("generate", "model", "--prompt", "a", "--max-new-tokens", "100000"),
        "exceed the model's positions",
    ),
    "no new tokens": (
        None,
        ("generate", "model", "--prompt", "a", "--max-new-tokens", "0"),
        "nothing to generate",
    ),
    "no prompt": (None, ("generate", "model"), "prompt"),
    "a temperature below 0": (
        None,
        ("generate", "model", "--prompt", "a", "--temperature", "-1"),
        "temperature is out of range",
    ),
    "plans for another number of layers": (
        swap_plans,
        ("generate", "model", "--prompt", "a"),
        "the plans are for another model",
    ),
    "routers of another model": (
        swap_routers,
        ("generate", "model", "--prompt", "a"),
        "routers",
    ),
    "eval of a model without routers": (
        None,
        ("eval", "perplexity", "plain", "--text", "long.txt"),
        "plain: the model has no routers yet",
    ),
    "eval of a model without plans": (
        lambda home: (home / "model" / "plans.json").unlink(),
        ("eval", "perplexity", "model", "--text", "long.txt", "--window", "64"),
        "has no plans yet",
    ),
    "eval at a density above 1": (
        None,
        ("eval", "perplexity", "model", "--text", "long.txt", "--window", "64", "--densities", ".5,7"),
        "above 0 and at most 1",
    ),
    "eval with nothing left to decode": (
        None,
        ("eval", "perplexity", "model", "--text", "long.txt", "--window", "64", "--context", "63"),
        "context: no token is left to score; got 63, expected 0 to 62",
    ),
    "eval with a density that is no number": (
        None,
        ("eval", "perplexity", "model", "--text", "long.txt", "--densities", ".5;.7"),
        "--densities: not numbers; got '.5;.7'",
    ),
    "eval with two kinds of nothing": (
        None,
        ("eval", "perplexity", "model", "--text", "long.txt", "--dense", "--densities", ".5"),
        "--dense and --densities contradict each other",
    ),
    "eval at a batch size above the number of windows": (
        None,
        ("eval", "perplexity", "model", "--text", "long.txt", "--window", "64", "--batch-sizes", "9999"),
        "too few windows to decode together; got batch size 9999",
    ),
    "eval with windows that leave out text": (
        None,
        ("eval", "agreement", "model", "--text", "long.txt", "--window", "64", "--stride", "64"),
        "stride: not a stride between windows; got 64, expected 1 to 63",
    ),
    "eval with a static selector that has seen the text": (
        None,
        (*"eval perplexity model --selectors static --text long.txt --static-text long.txt".split(),),
        "--static-text: the static selector would have seen the evaluated text; got long.txt",
    ),
    "eval with a static text for another selector": (
        None,
        (*"eval perplexity model --text long.txt --static-text no.txt".split(),),
        "--static-text is for selector static; got router",
    ),
    "eval with one file for two outputs": (
        None,
        (*"eval perplexity model --text long.txt --report new.png --picture ./new.png".split(),),
        "--report and --picture are one file",
    ),
    "eval with a picture of an unknown kind": (
        None,
        (*"eval perplexity model --text long.txt --report new.json --picture new.gif".split(),),
        "new.gif: no such kind of picture; expected .png, .pdf, .svg",
    ),
    "eval with a report that is there": (
        None,
        (*"eval agreement model --text long.txt --report short.txt --picture new.png".split(),),
        "short.txt: the output already exists",
    ),
    "tune into the root": (
        None,
        (*"tune model / --text long.txt --tokens 9 --overwrite".split(),),
        "/: overwriting is refused: this was not written by polarjax",
    ),
    "tune beside a folder of the user's": (
        lambda home: shutil.copytree(home / "hf", home / "new.tuning"),
        (*"tune model new --text long.txt --tokens 9 --overwrite".split(),),
        "new.tuning: overwriting is refused: this was not written by polarjax",
    ),
    "tune with nothing to resume": (
        None,
        (*"tune model new --text long.txt --tokens 9 --resume".split(),),
        "new.tuning: there is no interrupted tuning to resume",
    ),
    "activations that are there already": (
        None,
        ("sparsify", "plain", "--text", "short.txt", "--activations", "hf"),
        "--activations: the output already exists; got hf. Hint: choose another name, or remove it",
    ),
    "attention of one shard": (
        None,
        ("sparsify", "plain", "--text", "short.txt", "--attention", "sequences"),
        "--attention is for --shards. Hint: give --shards too",
    ),
    "activations that are not there": (
        None,
        ("train-routers", "plain", "--activations", "nowhere"),
        "nowhere",
    ),
} | {
    f"{words[-2]} {words[-1]} of {words[0]}": (None, words, f"{words[-2]}: {what}; got ")
    for what, words in (
        ("no such seed", ("generate", "model", "--prompt", "a", "--seed", str(2**63))),
        ("no such seed", ("train-routers", "model", "--activations", "a", "--seed", str(-(2**63) - 1))),
        ("no such seed", ("calibrate", "model", "--activations", "a", "--seed", "9" * 20)),
        ("no such seed", ("sparsify", "plain", "--text", "short.txt", "--seed", "9" * 20)),
        ("not a size", ("sparsify", "plain", "--text", "short.txt", "--max-gb", "nan")),
        ("not a size", ("collect", "plain", "--text", "short.txt", "--to", "a", "--max-gb", "inf")),
        ("not a size", ("export", "plain", "out", "--shard-gb", "nan")),
        ("not a size", ("export", "plain", "out", "--shard-gb", "inf")),
        ("not a size", ("export", "plain", "out", "--shard-gb", "-1")),
        ("not a size", ("inspect", "plain", "--memory", "nan")),
        ("not a size", ("inspect", "plain", "--memory", "inf")),
        ("not a size", ("inspect", "plain", "--memory", "1e300")),
    )
}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(home, tmp_path, monkeypatch, capsys, case):
    spoil, words, named = CASES[case]
    if spoil is not None:
        home = shutil.copytree(home, tmp_path / "home")
        spoil(home)
    monkeypatch.chdir(home)
    before = contents(home)
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()
    assert exit_.value.code == 2
    assert len(error) == 1, captured.err
    assert named in error[0]
    assert error[0].startswith("polarjax: ") and ". Hint: " in error[0], error[0]
    assert contents(home) == before
