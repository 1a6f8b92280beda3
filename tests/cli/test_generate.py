"""`polarjax generate` end to end on a tiny random model: settings, stops, streams, chats, files."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import polarjax as pj
from polarjax.checkpoint.learned import write_plans, write_routers
from polarjax.selection.routers import init_routers
from polarjax.text import continuation
from polarjax.text.tokenizer import Tokenizer
from tests.cli.homes import ASSET, random_model
from tests.model import zoo
from tests.one_line import refuses

SHORT = ("--max-new-tokens", "12")


def _result(answer: tuple[int, str, str]) -> dict:
    code, out, err = answer
    assert code == 0, err
    return json.loads(out)


def _with_settings(home: Path, target: Path, **settings) -> Path:
    shutil.copytree(home, target)
    (target / "tokenizer" / "generation_config.json").write_text(json.dumps(settings))
    return target


def _nothing_said(model, tokens, *rest, max_new_tokens, **options) -> pj.Generation:
    """Takes the place of `generate` where only its arguments matter."""
    rows = len(tokens)
    none = np.zeros(rows, bool)
    return pj.Generation(np.zeros((rows, max_new_tokens), np.int32), np.zeros(rows, np.int32), none, none)


def _recorded(monkeypatch, original=continuation.generate) -> list[dict]:
    """The arguments of every call of `generate` from here on."""
    calls = []

    def record(model, tokens, *rest, **options):
        calls.append(options | {"tokens": tokens})
        return original(model, tokens, *rest, **options)

    monkeypatch.setattr(continuation, "generate", record)
    return calls


def _line(answer: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    code, out, err = answer
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    return err


def test_the_models_settings_apply_and_flags_override_them(home, run, tmp_path):
    plain = _result(run("--prompt", "def f", *SHORT, "--json"))
    bundle = pj.load(home)
    stop = bundle.tokenizer.hf.encode(plain["texts"][0], add_special_tokens=False)[3]
    model = _with_settings(
        home, tmp_path / "m", eos_token_id=[stop, 4095], do_sample=True, top_k=5, min_p=0.1
    )
    one = run("--prompt", "def f", *SHORT, "--json", model=model)
    assert "ignored: min_p 0.1" in one[2]
    drawn = _result(one)
    assert drawn["texts"] != plain["texts"]
    complete = lambda **options: pj.load(model).complete("def f", max_new_tokens=12, **options)
    assert [each.text for each in complete()] == drawn["texts"]
    assert [each.text for each in complete(sampler=pj.Greedy(), stop_ids=())] == plain["texts"]
    greedy = _result(run("--prompt", "def f", *SHORT, "--greedy", "--json", model=model))
    assert greedy["endings"] == ["stop_id"]
    assert plain["texts"][0].startswith(greedy["texts"][0])
    free = _result(run("--prompt", "def f", *SHORT, "--greedy", "--stop-id", "4095", "--json", model=model))
    assert free["texts"] == plain["texts"]
    (model / "tokenizer" / "generation_config.json").write_text('{"max_new_tokens": 12}')
    assert _result(run("--prompt", "def f", "--json", model=model))["tokens"] == [12]
    (model / "tokenizer" / "generation_config.json").write_text('{"top_p": 7, "do_sample": true}')
    assert "generation_config.json: top_p" in _line(run("--prompt", "def f", model=model))
    (model / "tokenizer" / "generation_config.json").write_text('{"temperature": 0.0}')
    unusable = _line(run("--prompt", "def f", "--top-k", "5", "--dense", model=model))
    assert "the model's generation_config.json: temperature is out of range; got 0.0" in unusable


def test_a_stop_string_cuts_the_text_streamed_or_not(run):
    text = _result(run("--prompt", "def f", *SHORT, "--json"))["texts"][0]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    expected = text[: text.index(stop)]
    cut = _result(run("--prompt", "def f", *SHORT, "--stop", stop, "--stop", "never seen", "--json"))
    assert (cut["texts"], cut["endings"], cut["stopped"]) == ([expected], ["stop_string"], [True])
    code, out, _ = run("--prompt", "def f", *SHORT, "--stop", stop, "--stream", "--dense")
    assert code == 0
    assert out.startswith(f"def f{expected}\n{cut['tokens'][0]} tokens in ")
    both = run("--prompt", "def f", *SHORT, "--stop", stop, "--stream", "--json")
    assert _result(both)["texts"] == [expected]
    assert f"def f{expected}\n" in both[2]


def test_a_special_token_as_a_stop_string_is_a_stop_id(home, run, monkeypatch):
    calls = _recorded(monkeypatch)
    _result(run("--prompt", "def f", *SHORT, "--stop", "<|pad|>", "--json"))
    assert calls[0]["stop_ids"] == (1, 0)


def test_lines_go_to_standard_output(run):
    code, out, err = run("--prompt", "def f", "--output", "-", *SHORT)
    assert (code, json.loads(out)["completions"][0]["tokens"]) == (0, 12)
    assert "12 tokens in" in err
    assert "--output - and --json both need" in _line(run("--prompt", "def f", "--output", "-", "--json"))


def test_standard_output_by_name_holds_lines_alone_if_it_is_a_file(home, tmp_path):
    (tmp_path / "p.txt").write_text("def f\n")
    alone = ("--prompt", "def f", "--output", "/dev/stdout")
    of_a_file = ("--prompts", tmp_path / "p.txt", "--slots", "1", "--capacity", "40", "--output", "/dev/fd/1")
    program = "from polarjax.cli.main import main; main()"
    for words in (alone, of_a_file):
        command = [sys.executable, "-c", program, "generate", home, *words, *SHORT]
        with open(tmp_path / "out", "w+") as out:
            subprocess.run([*map(str, command)], check=True, stdout=out)
            out.seek(0)
            (line,) = out
        assert json.loads(line)["completions"][0]["tokens"] == 12
        assert not (tmp_path / "out.run").exists()


def test_several_sequences_of_a_prompt(run):
    words = ("--prompt", "a", "--prompt", "b", *SHORT, "--temperature", "2", "--num-return-sequences", "3")
    made = _result(run(*words, "--json"))
    assert made["prompts"] == ["a"] * 3 + ["b"] * 3
    assert len(set(made["texts"])) == 6
    assert made["texts"] == _result(run(*words, "--json"))["texts"]


def test_a_chat_goes_through_the_template(home, run):
    made = _result(run("--prompt", "hi", "--chat", "--system", "be brief", *SHORT, "--json"))
    bundle = pj.load(home)
    ids = bundle.tokenizer.hf.encode("<system>be brief<user>hi<assistant>", add_special_tokens=False)
    tokens, lengths = np.array([ids], np.int32), np.array([len(ids)], np.int32)
    expected = pj.generate(
        bundle.model, tokens, lengths, max_new_tokens=12, stop_ids=bundle.generation.stop_ids
    )
    assert made["texts"] == bundle.tokenizer.decode(expected.tokens, expected.lengths)
    code, out, _ = run("--prompt", "hi", "--chat", "--stream", *SHORT)
    assert code == 0
    assert "<user>" not in out
    assert not out.startswith(
        "The model has no routers yet, so this is dense; polarjax sparsify learns them.\nhi"
    )


def test_missing_sparsity_is_named_and_density_reported(home, run, tmp_path, monkeypatch):
    model = shutil.copytree(home, tmp_path / "m")
    config = pj.load(home).model.config
    write_routers(model, init_routers(config, jax.random.key(0)))
    printed = run("--prompt", "a", *SHORT, model=model)[1]
    assert printed.startswith(
        "The model has no plans yet, so this is dense; polarjax calibrate makes them.\n"
    )
    counts = (config.d_ff // 4, config.d_ff // 2)
    rows = tuple((count,) * config.num_layers for count in counts)
    recall = ((1.0,) * config.num_layers,) * 2
    sizes = (config.num_layers, config.d_ff, config.num_kv_heads)
    write_plans(model, pj.PlanTable(*sizes, (1, 2), rows, recall))
    kept = lambda *words: _result(run("--prompt", "a", *SHORT, *words, "--json", model=model))["density"]
    assert kept("--batch-size", "100")["neurons"] == 0.25
    drawn = ("--temperature", "1", "--num-return-sequences", "2")
    assert kept("--batch-size", "100", *drawn)["neurons"] == 0.5
    bundle, calls = pj.load(model), _recorded(monkeypatch, _nothing_said)
    for sparsity in ("auto", None, bundle.sparsity(2)):
        bundle.complete(["a", "b", "c"], max_new_tokens=12, batch_size=2, sparsity=sparsity)
    two, one = (bundle.sparsity(n).plan for n in (2, 1))
    plans = [call["sparsity"] and call["sparsity"].plan for call in calls]
    assert plans == [two, one, None, None, two, two]
    assert [len(call["tokens"]) for call in calls] == [2, 1, 2, 2, 2, 1], "repeats would vote for neurons"


def test_one_prompt_alone_is_a_list_of_one(home):
    bundle = pj.load(home)
    text, chat = "def f", [{"role": "user", "content": "hi"}]
    both = bundle.complete([text, tuple(chat)], max_new_tokens=12)
    assert bundle.complete(text, max_new_tokens=12) == both[:1]
    assert bundle.complete(chat, max_new_tokens=12) == both[1:]
    assert bundle.complete((each for each in [text]), max_new_tokens=12, key=jax.random.key(5)) == both[:1]
    long = bundle.complete("a " * 50, stop_ids=())
    assert len(long[0].tokens) == 64 + 1 - len(bundle.tokenizer.encode(["a " * 50])[0][0]), "as many as fit"


NOT_COMPLETED = {
    "nothing": ([], {}, "prompts: no prompt"),
    "no list": (3, {}, "prompts: not prompts; got int"),
    "bytes": (b"a", {}, "prompts: not prompts; got bytes"),
    "a message": ({"role": "user", "content": "a"}, {}, "prompts: not prompts; got dict"),
    "token ids": ([[1, 2]], {}, "prompt 1: messages is not a list of objects"),
    "a message without content": (
        ["a", [{"role": "user"}]],
        {},
        "prompt 2: messages is not a list of objects",
    ),
    "an empty conversation": ([[]], {}, "prompt 1: messages is not a list of objects"),
    "a number": (["a", 3], {}, "prompt 2: not a prompt; got int"),
    "half a character": (["a", "\ud800"], {}, "prompt 2: .*not a text"),
    "half a character as a name": (
        [[{"role": "user", "content": "a", "name": "\ud800"}]],
        {},
        "prompt 1: .*not a text",
    ),
    "too long": (["a", "a " * 70], {}, "prompt 2: the sequence would exceed"),
    "no new token": ("a", {"max_new_tokens": 0}, "max_new_tokens: nothing to generate"),
    "no batch": ("a", {"batch_size": 0}, "batch_size: no prompts in a batch"),
    "a text as stop strings": ("a", {"stop_strings": "b"}, "stop_strings: unusable"),
    "a plan": (
        "a",
        {"sparsity": pj.SparsityPlan((None,), (None,))},
        "sparsity: not a sparsity; got SparsityPlan",
    ),
    "a word": ("a", {"sparsity": "dense"}, "sparsity: not a sparsity; got 'dense'"),
    "no seed": ("a", {"key": 1.5}, "key: no such seed"),
}


@pytest.mark.parametrize("case", NOT_COMPLETED)
def test_complete_refuses_in_one_line(home, case):
    prompts, options, named = NOT_COMPLETED[case]
    with refuses(pj.InputError, named):
        pj.load(home).complete(prompts, **options)


def test_without_a_tokenizer_there_is_no_text(home):
    bundle = dataclasses.replace(pj.load(home), tokenizer=None)
    with refuses(
        pj.CheckpointError, "Bundle.complete: the model directory has no tokenizer, which text needs"
    ):
        bundle.complete("a")


def test_all_positions_can_be_used(run, home):
    """The last new token is never read."""
    bundle = pj.load(home)
    read = bundle.model.config.max_positions - len(bundle.tokenizer.encode(["a"])[0][0])
    most = ("--prompt", "a", "--stop-id", "4095", "--max-new-tokens")
    assert _result(run(*most, str(read + 1), "--json"))["tokens"] == [read + 1]
    assert run(*most, str(read + 2))[0] == 2


REFUSED = {
    "stream of two": (("--prompt", "a", "--prompt", "b", "--stream"), "--stream shows one sequence"),
    "stream of copies": (
        ("--prompt", "a", "--temperature", "1", "--num-return-sequences", "2", "--stream"),
        "--stream shows one sequence",
    ),
    "dense and sparse": (
        ("--prompt", "a", "--dense", "--head-density", "0.5"),
        "--dense and --head-density contradict each other",
    ),
    "greedy and drawn": (("--prompt", "a", "--greedy", "--top-k", "3"), "contradict each other; got top_k"),
    "greedy copies": (("--prompt", "a", "--num-return-sequences", "2"), "num_return_sequences: greedy"),
    "no copies": (("--prompt", "a", "--num-return-sequences", "0"), "num_return_sequences: no sequences"),
    "empty stop": (("--prompt", "a", "--stop", ""), "stop_strings: unusable"),
    "negative stop id": (("--prompt", "a", "--stop-id", "-1"), "--stop-id: not a token id"),
    "top_p": (("--prompt", "a", "--top-p", "1.5"), "--top-p: top_p is out of range"),
    "top_k": (("--prompt", "a", "--top-k", "-1"), "--top-k: top_k is out of range"),
    "nan": (("--prompt", "a", "--temperature", "nan"), "--temperature: temperature is out of range"),
    "temperature 0": (
        ("--prompt", "a", "--temperature", "0"),
        "omit it; --greedy takes the most likely",
    ),
    "no penalty": (
        ("--prompt", "a", "--repetition-penalty", "0"),
        "--repetition-penalty: repetition_penalty",
    ),
    "batch of none": (("--prompt", "a", "--batch-size", "0"), "--slots: no prompts in a batch"),
    "system alone": (("--prompt", "a", "--system", "s"), "--system is part of a chat"),
    "a long prompt is named": (
        ("--prompt", "a", "--prompt", "b " * 80),
        "prompt 2: the sequence would exceed",
    ),
    "too many tokens": (("--prompt", "a", "--max-new-tokens", "64"), "prompt 1: the sequence would exceed"),
    "no unicode": (("--prompt", "\udcff"), "prompt 1: Tokenizer.encode: not a text"),
    "output is a folder": (("--prompt", "a", "--output", ".", "--overwrite"), "directory is in the way"),
    "no such file": (("--prompts", "none.jsonl"), "none.jsonl: cannot read"),
    "resume of a prompt": (("--prompt", "a", "--resume"), "--resume is for --prompts"),
    "capacity of a prompt": (("--prompt", "a", "--capacity", "8"), "--capacity is for --prompts"),
    "log-probabilities of a prompt": (("--prompt", "a", "--logprobs", "0"), "--logprobs is for --prompts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(run, case):
    words, named = REFUSED[case]
    assert named in _line(run(*words, "--dense"))


def test_a_tokenizer_without_chat_template(home, run, tmp_path):
    model = _with_settings(home, tmp_path / "m")
    (model / "tokenizer" / "chat_template.jinja").unlink()
    assert "no chat template" in _line(run("--prompt", "a", "--chat", "--dense", model=model))


def test_fault_19_nan_logits_write_nothing(run, tmp_path):
    model = zoo.with_rows(random_model(np.random.default_rng(0)), "final_norm.bias", 0, np.nan)
    pj.save(tmp_path / "m", pj.Bundle(model, Tokenizer.load(ASSET)))
    words = ("--prompt", "a", "--dense", *SHORT, "--output", tmp_path / "out.jsonl")
    assert "computes NaN or infinity; got 1 of 1 sequences" in _line(run(*words, model=tmp_path / "m"))
    assert [each.name for each in tmp_path.iterdir()] == ["m"]
