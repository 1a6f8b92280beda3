"""The quality study: its commands are ones that the verbs take, each runs once, and reports become rows."""

import importlib
import inspect
import json
import os
import sys

import pytest

from bench.quality import steps, study
from bench.report import ROOT, read_jsonl
from polarjax.cli.main import VERBS

FAKE = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
value = lambda name: pathlib.Path(words[words.index(name) + 1])
print("said", *words[:2], file=sys.stderr)
if "wikitext2" in " ".join(words):
    sys.exit("no luck")
if words[0] == "convert":
    pathlib.Path(words[2]).mkdir()
    pathlib.Path(words[2], "manifest.json").touch()
if words[0] == "sparsify":
    pathlib.Path(words[1], "plans.json").touch()
if words[0] == "tune":
    state = pathlib.Path(words[2] + ".tuning")
    if "--resume" not in words:
        state.mkdir()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("kept the state"))
        time.sleep(30)
    state.rmdir()
    pathlib.Path(words[2]).mkdir()
    for name in ("manifest.json", "plans.json"):
        pathlib.Path(words[2], name).touch()
    print(json.dumps({"seconds": 60, "words": words}))
if words[0] == "eval":
    value("--report").write_text("{}")
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a model and texts, and a verb that makes what the real ones make."""
    (tmp_path / "fake_verbs.py").write_text(FAKE)
    monkeypatch.setattr(study, "POLARJAX", "fake_verbs")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    for folder in ("model", "texts"):
        (tmp_path / "work" / folder).mkdir(parents=True)
    (tmp_path / "work" / "model" / "manifest.json").touch()
    for name in (*study.TRAINING, *study.HELD_OUT):
        (tmp_path / "work" / "texts" / f"{name}.txt.xz").touch()
    return tmp_path / "work"


def ask(work, question, *words) -> int:
    return study.main([question, "--work", str(work), *words])


def plan(question: str, *words: str) -> list[steps.Step]:
    asked = study.arguments([question, "--work", "w", "--gguf", "g", *words])
    return [step for chain in study.QUESTIONS[question](asked) for step in chain]


@pytest.mark.parametrize(
    ("question", "count"),
    [
        ("make", 4),
        ("sparsify", 2),
        ("heal", 2),
        ("relu", 3),
        ("cost", 6),
        ("batch", 6),
        ("tasks", 15),
        ("own_groups", 3),
    ],
)
def test_verbs_know_the_planned_options(question, count):
    planned = plan(question)
    assert (
        len(planned)
        == len({step.name for step in planned})
        == len({step.output for step in planned})
        == count
    )
    for step in planned:
        module, *words = step.command
        if module == study.POLARJAX:
            verb = next(name for name in (" ".join(words[:2]), words[0]) if name in VERBS)
            file, function = VERBS[verb].function.split(":")
            known = {*inspect.signature(getattr(importlib.import_module(file), function)).parameters, "json"}
            given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
            assert given <= known, verb


def test_options_after_two_dashes_replace_the_usual_ones():
    *_, tune = plan("heal", "--name", "no_own_text", "--", "--own-text", "0", "--minutes=2")
    assert tune.command.count("--own-text") == 1 and "--minutes" not in tune.command
    assert tune.options[-3:] == ("--own-text", "0", "--minutes=2") and "--blend" in tune.options
    assert tune.command[2:4] == ("w/model", "w/no_own_text")
    assert plan("tasks", "--", "--limit", "8")[0].command[-3:] == ("--dense", "--limit", "8")
    for wrong in (["rows", "--work", "w", "--", "--x"], ["make", "--work", "w"]):
        with pytest.raises(SystemExit):
            study.arguments(wrong)
    for name in ("model", "../healed", ""):
        with pytest.raises(SystemExit):
            study.arguments(["heal", "--work", "w", "--name", name])


def test_what_is_there_is_not_made_again_and_what_fails_stops_nothing(work, capsys):
    assert ask(work, "cost", "--jobs", "2") == 1
    out = capsys.readouterr().out
    assert "cost/model/novels_valid: left out: " in out and "plans.json is missing (run sparsify" in out
    (work / "model" / "plans.json").touch()
    assert ask(work, "cost", "--jobs", "2") == 1
    out = capsys.readouterr().out.splitlines()
    assert "cost/model/wikitext2_raw_test: failed with exit code 1 after 0 s: no luck" in out
    assert "cost/model/code_evaluation: 0 s" in out
    assert len([line for line in out if line.startswith("cost/healed/") and "left out" in line]) == 3
    found = {row["step"]: row["exit_code"] for row in read_jsonl(work / steps.RECORD)}
    names = ("novels_valid", "wikitext2_raw_test", "code_evaluation")
    assert found == {f"cost/model/{name}": int(name.startswith("wiki")) for name in names}
    assert steps.recorded(work).keys() == {"cost/model/novels_valid", "cost/model/code_evaluation"}
    (work / "texts" / "wikitext2_raw_test.txt.xz").unlink()
    ask(work, "cost")
    out = capsys.readouterr().out
    assert "cost/model/novels_valid: there already" in out
    assert "wikitext2_raw_test.txt is missing (plain or .xz)" in out
    assert ask(work, "cost", "--plan") == 0 and "--selectors router,oracle" in capsys.readouterr().out


def test_models_are_made_in_folders_that_are_new(work):
    """Also where an interrupted call left something."""
    (work / "own_groups").mkdir()
    (work / "own_groups" / "some").touch()
    for name in ("model", "own_groups"):
        (work / f"{name}.huggingface").mkdir()
        (work / f"{name}.huggingface" / "tokenizer.json").touch()
    assert ask(work, "make", "--gguf", "unused") == 0
    assert [path.name for path in (work / "own_groups").iterdir()] == ["manifest.json"]


def test_the_limit_ends_what_runs_and_the_next_call_continues_it(work, capsys, monkeypatch):
    assert ask(work, "heal", "--limit", "5") == 1
    assert capsys.readouterr().out.splitlines() == [
        "sparsify/model: not begun: the time is up",
        f"tune/healed: left out: {work / 'model' / 'plans.json'} is missing (run sparsify first)",
    ]
    monkeypatch.setattr(steps, "ENOUGH", 0.1)
    assert ask(work, "heal", "--limit", "1") == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("sparsify/model: ") and told[0].endswith(" s")
    assert told[1].startswith("tune/healed: ended, because the time is up, after ")
    assert told[1].endswith("kept the state") and (work / "healed.tuning").exists()
    assert ask(work, "heal") == 0
    words = json.loads((work / "reports" / "tune" / "healed.json").read_text())["words"]
    assert words[-2:] == ["--json", "--resume"] and not (work / "healed.tuning").exists()


def estimate(value: float) -> dict:
    return {"value": value, "standard_error": value / 10}


def report(name: str, batch: int | None) -> dict:
    about = {"protocol": "masked" if batch is None else "decode", "batch_size": batch}
    sparse = {"perplexity": {"token": estimate(44.0)}}
    row = about | {"selector": "router", "plan": {"groups": [None, 5, 5]}, "sparse": sparse}
    row |= {
        "against_dense": {"increase": {"token": estimate(0.1)}},
        "kl": estimate(0.2),
        "top1": estimate(0.7),
    }
    return {
        "model": {"path": "m", "groups": 9, "dtype": "bfloat16"},
        "text": {
            "texts": [{"name": f"t/{name}.txt.xz"}],
            "windows": 96,
            "window": 512,
            "scored_tokens": 49056,
        },
        "dense": [about | {"perplexity": {"token": estimate(40.0)}}],
        "rows": [row],
        "versions": {"device": "a GPU", "jax": "1"},
    }


def write(work, name: str, content: dict, *options: str) -> None:
    path = work / "reports" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    record = {"step": name, "exit_code": 0, "commit": "c", "options": options}
    with (work / steps.RECORD).open("a") as file:
        file.write(json.dumps(record) + "\n")


def test_reports_become_rows(tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "quality.jsonl"
    assert ask(work, "rows") == 1 and "no reports in" in capsys.readouterr().out
    tune = {"seconds": 360.0, "tokens": 50_000_000, "tokens_per_second": 138_888.9, "peak": None}
    write(work, "tune/healed", tune | {"memory": {"total": 5}}, "--blend", "0.8")
    write(work, "cost/healed/code_evaluation", report("code_evaluation", None))
    write(work, "batch/healed/novels_valid_16", report("novels_valid", 16))
    metrics = {"local_arc_easy": {"items": 2376, "few_shot": 0, "acc": 0.5, "acc_stderr": 0.01}}
    for variant in ("model/1_masked", "healed/0.56_decode"):
        write(work, f"tasks/{variant}_arc_easy", {"model_dtype": "bfloat16", "tasks": metrics})
    (work / "reports" / "cost" / "healed" / "novels_valid.json").write_text("{")
    assert ask(work, "rows", "--out", str(out)) == 0
    assert "novels_valid.json is left out: " in capsys.readouterr().out
    found = read_jsonl(out)
    dense, router = (row for row in found if row.get("text") == "standard_library_evaluation")
    healed = "polarjax tune --blend 0.8: 6.0 min, 50,000,000 tokens"
    assert (router["what"], router["kept"], router["increase"], router["stage"]) == ("router", 5, 0.1, healed)
    assert (dense["device"], dense["platform"], dense["commit"], dense["windows"]) == (
        "a GPU",
        "gpu",
        "c",
        96,
    )
    decoded, came = (row for row in found if row["what"] == "task")
    assert (decoded["kept"], decoded["protocol"], decoded["task"]) == (5, "decode", "arc_easy")
    assert came["stage"] == "as it comes" and came["kept"] == 9
    known = read_jsonl(ROOT / "bench" / "results" / "quality.jsonl")
    for what in ("dense", "router", "task", "training"):
        wanted = set.intersection(*(set(row) for row in known if row["what"] == what))
        mine = next(row for row in found if row["what"] == what)
        assert wanted - {"bos"} <= mine.keys(), what
    assert ask(work, "rows", "--out", str(out)) == 0
    assert f"0 of {len(found)} rows appended" in capsys.readouterr().out


def test_help_names_every_question(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", "--help"])
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n{question} " in shown for question in (*study.QUESTIONS, "rows"))
