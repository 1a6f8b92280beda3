"""`polarjax generate --prompts`: lines in, lines out, in order, and nothing lost when the process is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import polarjax as pj
from polarjax.checkpoint.learned import write_plans, write_routers
from polarjax.cli import answering, job_output
from polarjax.cli import main as command
from polarjax.engine.engine import Engine
from polarjax.jobs import line_requests
from polarjax.selection.routers import init_routers
from polarjax.text import prompts
from tests.model import zoo

SIZES = ("--slots", "2", "--capacity", "40", "--max-new-tokens", "12")
STOP = 2889
ENTRIES = [
    {"id": 0, "prompt": "def f", "max_new_tokens": 30},
    {"id": "\ud800 日本\u2028", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.5},
    {"prompt": "x = " * 40},
    {"prompt": [5, 6, 7], "logprobs": 2, "max_new_tokens": 3},
    {"prompt": "x = ", "temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.3},
    {"prompt": "x = ", "temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.3},
    {"prompt": "x = ", "temperature": 1},
    {"prompt": "x = ", "temperature": 1},
    {"prompt": "x = ", "temperature": None, "stop": None},
    {"prompt": "x = ", "temperature": "hot"},
    {"prompt": "y", "stop_ids": [2, STOP], "stop": ["never"]},
    {"prompt": "y", "stop_ids": [STOP] * 17},
]
LINES = [*map(json.dumps, ENTRIES), "{bad", '{"prompt": "z"}']
ERRORS = [2, 9, 11, 12]


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "in.jsonl").write_text("\n\n".join(LINES) + "\r\n")
    return tmp_path / "in.jsonl"


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> Path:
    """The output of one run over `LINES`."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "in.jsonl").write_text("\n\n".join(LINES) + "\r\n")
    with pytest.raises(SystemExit) as exit_:
        words = ["generate", home, "--prompts", folder / "in.jsonl", "--output", folder / "out.jsonl", *SIZES]
        command.main([*map(str, words), "--json"])
    assert exit_.value.code == answering.SOME_FAILED
    return folder / "out.jsonl"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def refused(answer: tuple[int, str, str]) -> str:
    """The last line of a refusal."""
    code, _, err = answer
    assert code == 2, err
    return err.splitlines()[-1]


def alone(home: Path, prompt, **options) -> dict:
    """What an engine makes of a prompt, as the output has it."""
    with pj.Engine(pj.load(home), slots=2, capacity=40) as engine:
        engine.submit(prompt, **{"max_new_tokens": 12} | options)
        events = list(engine)
    tokens = sum((event.tokens for event in events), ())
    ending = "stop_id" if events[-1].finished == "stop" else events[-1].finished
    return {"text": "".join(event.text for event in events), "tokens": len(tokens), "ending": ending}


def test_lines_are_answered_in_order_with_their_own_settings(home, whole):
    lines = records(whole)
    kept = [{k: v for k, v in line.items() if k not in ("completions", "error")} for line in lines]
    assert kept == [*ENTRIES, {"line": 25}, {"prompt": "z"}]
    assert [i for i, line in enumerate(lines) if "error" in line] == ERRORS
    assert all(("completions" in line) != ("error" in line) for line in lines)
    assert "line 5: the sequence would exceed" in lines[2]["error"]
    assert "line 19: temperature is not usable; got 'hot'" in lines[9]["error"]
    assert lines[11]["error"].startswith("line 23: stop_ids: too many stop ids; got 17, expected at most 16")
    assert lines[11]["error"].endswith("Hint: give the others as stop")
    assert "line 25: not JSON" in lines[12]["error"]
    drawn = {"sampler": pj.Categorical(0.8, 9, 0.9), "repetition_penalty": 1.3, "seed": 3}
    for i, prompt, options in (
        (0, "def f", {"max_new_tokens": 30}),
        (4, "x = ", drawn),
        (8, "x = ", {}),
        (10, "y", {"stop_ids": (2, STOP)}),
    ):
        assert lines[i]["completions"] == [alone(home, prompt, **options)]
    assert lines[10]["completions"][0]["ending"] == "stop_id"
    assert lines[4]["completions"] == lines[5]["completions"], "the same seed"
    assert lines[6]["completions"] != lines[7]["completions"], "seeds of their own"
    (one,) = lines[3]["completions"]
    logprobs = one["logprobs"]
    assert len(logprobs["tokens"]) == one["tokens"] == 3
    assert logprobs["chosen"] == [row[0] for row in logprobs["best"]], "greedy"
    assert logprobs["tokens"] == [row[0] for row in logprobs["ids"]]
    assert [len(row) for row in logprobs["best"]] == [2, 2, 2]


def test_all_ways_in_and_out_give_the_same(run, whole, source, tmp_path):
    """From standard input to standard output, with another number of slots, and from other names."""
    reader, writer = os.pipe()
    os.write(writer, source.read_bytes())
    os.close(writer)
    before = os.dup(0)
    os.dup2(reader, 0)
    code, out, err = run("--prompts", "-", "--output", "-", *SIZES)
    os.dup2(before, 0)
    for each in (reader, before):
        os.close(each)
    assert (code, out.encode()) == (3, whole.read_bytes()), err
    assert "14 prompts" in err and "4 of 14 prompts have no answer, the first because of this: line 5" in err
    code, _, err = run("--prompts", source, "--output", tmp_path / "o", "--batch-size", *SIZES[1:])
    assert (code, (tmp_path / "o").read_bytes()) == (3, whole.read_bytes()), err


def test_texts_are_printed_without_an_output(run, home, tmp_path):
    (tmp_path / "in.txt").write_text("def f\n\nx\n\n" + "x = " * 40)
    code, out, err = run("--prompts", tmp_path / "in.txt", "--prompt", "first", *SIZES)
    assert code == 3
    texts = [alone(home, each)["text"] for each in ("first", "def f", "x")]
    shown = [f"\n--- {p}\n{p}{t}\n" for p, t in zip(["first", "def f", "x"], texts, strict=True)]
    assert "".join(shown) in out
    assert "polarjax: line 5: the sequence would exceed" in err
    result = json.loads(run("--prompts", tmp_path / "in.txt", *SIZES, "--json")[1])
    assert (result["texts"], result["tokens"], result["errors"]) == (texts[1:], [12, 12], 1)
    (tmp_path / "in.txt").write_text("def f")
    code, out, _ = run("--prompts", tmp_path / "in.txt", "--stream", *SIZES)
    assert code == 0
    assert f"def f{texts[1]}\n" in out


def test_several_sequences_of_a_line(run, home, tmp_path):
    (tmp_path / "in.txt").write_text("a\nb\n")
    words = ("--temperature", "2", "--num-return-sequences", "3", "--seed", "5", "--logprobs", "0")
    for name in ("out", "again"):
        assert run("--prompts", tmp_path / "in.txt", "--output", tmp_path / name, *SIZES, *words)[0] == 0
    made = records(tmp_path / "out")
    assert len({each["text"] for line in made for each in line["completions"]}) == 6
    assert made == records(tmp_path / "again")
    first = alone(home, "a", sampler=pj.Categorical(2.0), seed=5)
    assert made[0]["completions"][0].items() > first.items()
    assert len(made[0]["completions"][0]["logprobs"]["chosen"]) == 12


@pytest.mark.parametrize("kept", [3, 0.3, 0.7, -1, 1])
def test_what_was_interrupted_is_finished_byte_for_byte(run, whole, source, tmp_path, kept):
    """Whatever is left of the output: a part of a line, whole lines, all."""
    out, content = tmp_path / "out.jsonl", whole.read_bytes()
    refusal = run("--prompts", source, "--output", whole, *SIZES)
    assert "already exists. Hint: go on with --resume, replace it with --overwrite" in refused(refusal)
    count = int(kept * len(content)) if 0 < kept <= 1 else kept % len(content)
    out.write_bytes(content[:count])
    shutil.copy(f"{whole}.run", f"{out}.run")
    code, _, err = run("--prompts", source, "--output", out, *SIZES, "--resume")
    assert (code, out.read_bytes()) == (3, content), err
    assert "4 of 14 prompts have no answer" in err


def test_texts_that_cannot_fit_are_not_tokenized(run, home, tmp_path, monkeypatch):
    """Tokenizing megabytes would stop the other lines for long."""
    monkeypatch.setattr(prompts, "_CHEAP", 0)
    tokenizer = pj.load(home).tokenizer
    most = prompts.most_characters(tokenizer, 40)
    texts = ["x", "x" * (most + 1), "x" * most]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    assert run("--prompts", tmp_path / "in.txt", "--output", tmp_path / "o", *SIZES)[0] == 3
    errors = [line.get("error", "") for line in records(tmp_path / "o")]
    assert not errors[0]
    assert (
        f"line 2: the prompt is too long; got {most + 1:,} characters, expected at most {most:,}" in errors[1]
    )
    assert "tokens" in errors[2]


def test_where_neurons_are_chosen_for_all_rows_unfinished_groups_run_again(run, home, tmp_path, monkeypatch):
    """So the answers are the same: each line runs beside the same others as in an uninterrupted run."""
    monkeypatch.setattr(line_requests, "most_held", lambda slots: 6)
    model, source = shutil.copytree(home, tmp_path / "m"), tmp_path / "in.jsonl"
    config = pj.load(model).model.config
    write_routers(model, init_routers(config, jax.random.key(0)))
    sizes = (config.num_layers, config.d_ff, config.num_kv_heads)
    rows = ((config.d_ff // 4,) * config.num_layers,)
    write_plans(model, pj.PlanTable(*sizes, (2,), rows, ((1.0,) * config.num_layers,)))
    lengths = (9, 2, 20, 1, 13, 5, 17, 3, 11, 2, 19, 4, 8, 14, 6, 1)
    prompts = [json.dumps({"prompt": f"x{i} = ", "max_new_tokens": n}) for i, n in enumerate(lengths)]
    source.write_text("\n".join(prompts))
    words = ("--prompts", source, *SIZES, "--output")
    assert run(*words, tmp_path / "whole", model=model)[0] == 0
    content = (tmp_path / "whole").read_bytes()
    lines = content.splitlines(keepends=True)
    for kept in (1, 6, 9):
        (tmp_path / "out").write_bytes(b"".join(lines[:kept])[: -1 if kept == 9 else None])
        shutil.copy(tmp_path / "whole.run", tmp_path / "out.run")
        assert run(*words, tmp_path / "out", "--resume", model=model)[0] == 0
        assert (tmp_path / "out").read_bytes() == content, f"from line {kept} on"
    more = refused(run(*words, tmp_path / "out", "--resume", "--slots", "3", model=model))
    assert "begun with another value of slots; got 2, expected 3" in more


def test_resume_starts_where_there_is_nothing(run, whole, source, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    assert run("--prompts", source, "--output", out, *SIZES, "--resume")[0] == 3
    assert out.read_bytes() == whole.read_bytes()
    assert Path(f"{out}.run").read_bytes() == Path(f"{whole}.run").read_bytes()
    assert {each.name for each in out.parent.iterdir()} == {"out.jsonl", "out.jsonl.run"}


def test_a_killed_process_loses_and_doubles_nothing(run, home, tmp_path):
    """Answers are in the file while a pipe still waits for lines; after SIGKILL, the rest comes from a file."""
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    lines = [f"x{i} = \n" for i in range(20)]
    source.write_text("".join(lines))
    words = [*SIZES, "--temperature", "1"]
    command = [sys.executable, "-c", "from polarjax.cli.main import main; main()", "generate", str(home)]
    command += ["--prompts", "-", "--output", str(out), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write("".join(lines[:7]).encode())
        process.stdin.flush()
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 7):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        problem = process.stderr.read()
    assert process.returncode == -signal.SIGKILL, problem
    before = out.read_bytes()
    assert before.count(b"\n") == 7
    out.write_bytes(before[:-20])  # as if it had been killed while it wrote
    assert run("--prompts", source, *words, "--output", out, "--resume")[0] == 0
    assert out.read_bytes().startswith(before)
    assert run("--prompts", source, *words, "--output", tmp_path / "whole.jsonl")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_ctrl_c_leaves_what_was_done(run, whole, source, tmp_path, monkeypatch):
    following, calls = Engine.__next__, iter(range(10**6))

    def interrupted(self):
        if next(calls) == 20:
            raise KeyboardInterrupt
        return following(self)

    monkeypatch.setattr(Engine, "__next__", interrupted)
    out = tmp_path / "out.jsonl"
    code, _, err = run("--prompts", source, "--output", out, *SIZES)
    assert code == 130
    left = out.read_bytes()
    assert whole.read_bytes().startswith(left) and left.endswith(b"\n")
    assert f"{out} has {left.count(b'\n')} lines; --resume goes on" in err
    assert run("--prompts", source, "--output", out, *SIZES, "--resume")[0] == 3
    assert out.read_bytes() == whole.read_bytes()


OTHERS = {
    "tokens": (("--max-new-tokens", "11"), "begun with another value of max_new_tokens; got 12, expected 11"),
    "capacity": (("--capacity", "48"), "begun with another value of capacity; got 40, expected 48"),
    "seed": (("--seed", "1"), "begun with another value of seed; got 0, expected 1"),
    "dtype": (("--dtype", "bfloat16"), "begun with another value of dtype; got float32, expected bfloat16"),
    "prompt": (("--prompt", "a"), r"begun with another value of prompt; got \[\], expected \['a'\]"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_output_of_another_run_is_not_continued(run, whole, source, tmp_path, case):
    words, named = OTHERS[case]
    out = tmp_path / "out.jsonl"
    for suffix in ("", ".run"):
        shutil.copy(f"{whole}{suffix}", f"{out}{suffix}")
    assert re.search(named, refused(run("--prompts", source, "--output", out, *SIZES, *words, "--resume")))
    assert out.read_bytes() == whole.read_bytes()


def test_the_output_of_other_prompts_is_not_continued(run, whole, source, tmp_path):
    out = tmp_path / "out.jsonl"
    for suffix in ("", ".run"):
        shutil.copy(f"{whole}{suffix}", f"{out}{suffix}")
    again = lambda prompts=source: refused(run("--prompts", prompts, "--output", out, *SIZES, "--resume"))
    source.write_text(source.read_text() + '{"prompt": "more"}\n')
    assert "begun with another value of prompts file" in again()
    content = source.read_text().replace('"x = "', '"x == "', 1)
    reader, writer = os.pipe()
    os.write(writer, content.encode())
    os.close(writer)
    assert 'out.jsonl, line 5: the output is of other prompts; got {"prompt": "x = "' in again(
        f"/dev/fd/{reader}"
    )
    os.close(reader)
    Path(f"{out}.run").unlink()
    assert "out.jsonl.run: the record of the output is missing" in again()
    assert out.read_bytes() == whole.read_bytes()


REFUSED = {
    "existing": ((), "out.jsonl: the output already exists. Hint: replace it with --overwrite, or choose"),
    "both": (("--resume", "--overwrite"), "--resume and --overwrite contradict each other"),
    "resumed stdout": (("--output", "-", "--resume"), "--resume: only a file can be resumed; got -"),
    "resumed device": (("--output", "/dev/null", "--resume"), "only a file can be resumed; got /dev/null"),
    "folder": (("--output", ".", "--overwrite"), "a directory is in the way"),
    "itself": (("--output", "in.jsonl", "--overwrite"), "in.jsonl: this is the file of the prompts"),
    "a link to itself": (("--output", "link", "--overwrite"), "in.jsonl: this is the file of the prompts"),
    "its record": (("--output", "in", "--overwrite"), "in.run: this is the file of the prompts"),
    "another record": (("--output", "other"), "other.run: the record of the output goes here"),
    "below a file": (("--output", "in.jsonl/out"), "in.jsonl: cannot write here"),
    "unseen": (("--logprobs", "2"), "--logprobs is for --output"),
    "mixed": (("--output", "-", "--json"), "--output - and --json both need standard output"),
    "long": (("--max-new-tokens", "41"), "lower max_new_tokens, or give a larger capacity"),
    "nothing": (("--max-new-tokens", "0"), "max_new_tokens: nothing to generate"),
    "slots": (("--slots", "0"), "--slots"),
    "capacity": (("--capacity", "-1"), "--capacity: capacity is not usable"),
    "log-probabilities": (("--logprobs", "21"), "--logprobs: unusable number"),
    "seed": (("--seed", str(2**63)), "--seed: no such seed"),
    "stop ids": (("--stop-id", "7") * 17, "--stop-id: too many stop ids; got 17, expected at most 16"),
    "copies": (("--num-return-sequences", "0"), "num_return_sequences: no sequences"),
    "stream": (("--stream",), "--stream shows one sequence"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_is_touched(run, source, tmp_path, monkeypatch, case):
    words, named = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for name in ("out.jsonl", "other.run"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "link").symlink_to("in.jsonl")
    (tmp_path / "in.run").hardlink_to("in.jsonl")
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    output = () if case in ("stream", "unseen") else ("--output", "out.jsonl")
    over = () if case == "existing" or {"--resume", "--overwrite"} & {*words} else ("--overwrite",)
    line = refused(run("--prompts", "in.jsonl", *output, *over, *SIZES, *words, "--dense"))
    assert named in line
    assert ". Hint: " in line
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_an_output_that_appears_while_the_model_is_loaded_stays(run, source, tmp_path, monkeypatch):
    out, load = tmp_path / "out.jsonl", answering.load_with_tokenizer

    def slow(*args, **kwargs):
        out.write_text("precious")
        return load(*args, **kwargs)

    monkeypatch.setattr(answering, "load_with_tokenizer", slow)
    assert "out.jsonl: the output already exists" in refused(
        run("--prompts", source, "--output", out, *SIZES)
    )
    assert out.read_text() == "precious" and not Path(f"{out}.run").exists()


def test_closed_standard_output_is_refused(run, source, monkeypatch):
    """Whatever file has its number then."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(job_output, "_status", lambda path, standard: source.stat())
    line = refused(run("--prompts", source, "--output", "-"))
    assert "--output: standard output is closed; got -. Hint: name a file" in line


def test_overwrite_replaces_and_a_full_disk_leaves_whole_lines(run, whole, source, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("old\n" * 9)
    with monkeypatch.context() as patch:
        put = job_output.LineFile._put

        def full(self, data):
            if self._size > 500:
                os.write(self._stream.fileno(), bytes(data[:5]))
                raise OSError(28, "No space left on device")
            put(self, data)

        patch.setattr(job_output.LineFile, "_put", full)
        line = refused(run("--prompts", source, "--output", out, "--overwrite", *SIZES))
        assert "out.jsonl: cannot write here; got No space left on device. Hint: make room, and go on" in line
    assert whole.read_bytes().startswith(out.read_bytes()) and out.read_bytes().endswith(b"\n")
    assert run("--prompts", source, "--output", out, "--resume", *SIZES)[0] == 3
    assert out.read_bytes() == whole.read_bytes()
    line = refused(run("--prompts", source, "--output", "/dev/full", *SIZES))
    assert "/dev/full: cannot write here; got No space left on device" in line


def test_fault_19_nan_in_one_line_is_an_error_of_that_line(run, home, tmp_path, monkeypatch):
    """The other lines are answered as ever; the exit code says that one is not."""
    bundle = pj.load(home)
    model = zoo.with_rows(bundle.model, "embed.positions", 17, np.nan)
    broken = pj.Bundle(jax.device_put(model, jax.devices()[0]), bundle.tokenizer)
    monkeypatch.setattr(answering, "load_with_tokenizer", lambda *_: (broken, broken.tokenizer))
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"prompt": [5] * n}) for n in (1, 16, 1)))
    words = ("--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "o", *SIZES)
    assert run(*words)[0] == 3
    good, bad, again = records(tmp_path / "o")
    assert good == again and good["completions"] == [alone(home, [5])]
    assert bad["completions"] == [{"text": "", "tokens": 0, "ending": "failed"}]
    assert bad["error"].startswith("line 2: the model computes NaN or infinity; got 1 of 1 sequences")
