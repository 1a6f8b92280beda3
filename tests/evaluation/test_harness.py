"""`HarnessLM` and `polarjax eval harness` with the real lm-evaluation-harness, if it is installed."""

import dataclasses
import importlib
import importlib.util
import json
import re
import sys
import tomllib
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from polarjax.cli import eval_harness
from polarjax.cli import main as command
from polarjax.errors import CheckpointError, InputError, SparsityError
from polarjax.evaluation.continuations import score_continuations
from polarjax.selection.routers import init_routers
from polarjax.text.tokenizer import Tokenizer
from tests.cli.homes import TEMPLATE, random_model
from tests.one_line import refuses
from tests.tolerances import assert_close

ROOT = Path(__file__).parents[2]
ASSETS = Path(pj.__file__).parent / "assets"
NEEDED = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
DATA = [{"query": f"Is {i} even?", "choices": [" yes", " no", " maybe"], "gold": i % 2} for i in range(5)]


def bundle_of(name: str) -> pj.Bundle:
    """A small random model, with the tokenizer of a bundled one, routers and plans."""
    model = random_model(np.random.default_rng(0))
    tokenizer = Tokenizer.load(ASSETS / name)
    hf = tokenizer.hf
    hf.chat_template = TEMPLATE
    config = model.config
    table = pj.PlanTable(
        num_layers=config.num_layers,
        num_neurons=config.d_ff,
        num_groups=config.num_kv_heads,
        batch_sizes=(1, 2),
        neurons=((8, 8), (16, 16)),
        recall=((1.0, 1.0), (1.0, 1.0)),
    )
    return pj.Bundle(model, tokenizer, init_routers(config, pj.generation.checks.random_key(0)), table)


@pytest.fixture(scope="module")
def bundle():
    return bundle_of("opt-6m")


@pytest.fixture(scope="module")
def make():
    """The class, imported without the warnings that lm-eval's own imports make."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("polarjax.evaluation.harness").HarnessLM


def asked(*arguments):
    """Requests as lm-eval passes them."""
    return [SimpleNamespace(args=each) for each in arguments]


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "polarjax.evaluation.harness", raising=False)
    monkeypatch.delitem(vars(pj.evaluation), "HarnessLM", raising=False)
    with refuses(InputError, r"needs the package lm-eval, 0.4.13.* pip install 'polarjax\[eval\]'"):
        pj.evaluation.HarnessLM  # noqa: B018
    assert "HarnessLM" not in pj.evaluation.__all__  # a star import works without the package


@NEEDED
def test_registered_beside_lm_evals_own_models(make):
    from lm_eval.api.registry import get_model

    assert get_model("polarjax") is make
    assert get_model("dummy").__module__ == "lm_eval.models.dummy"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"]["lm_eval.models"]["polarjax"]
    assert EntryPoint("polarjax", entry, "lm_eval.models").load() is make


PAIRS = [
    ("Once upon a time", " there was a king"),
    ("Once upon a time ", "there was"),  # the space moves to the continuation
    ("", "Hello"),  # after the prefix token
    ("Once upon a time", " there"),
    ("word " * 99, "end"),  # longer than the 64 positions
    ("Once upon a time", " never"),
    (" ", "Hello"),  # no text is left before the continuation
]


@NEEDED
@pytest.mark.parametrize("add_bos_token", [None, False])
@pytest.mark.parametrize("sparsity", [None, "auto"])
def test_log_likelihoods_are_those_of_the_tokens_in_the_order_of_the_requests(
    make, bundle, sparsity, add_bos_token
):
    lm = make(bundle, sparsity=sparsity, add_bos_token=add_bos_token, batch_size=2)
    cached = {}
    lm.set_cache_hook(
        SimpleNamespace(add_partial=lambda kind, key, value: cached.update({(kind, key): value}))
    )
    found = lm.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    assert cached == {("loglikelihood", pair): value for pair, value in zip(PAIRS, found, strict=True)}
    hf, bos = bundle.tokenizer.hf, bundle.tokenizer.bos_id
    with_bos = {} if add_bos_token is None else {"add_special_tokens": add_bos_token}
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        kept = context.rstrip()
        whole = hf.encode(context + continuation, **with_bos)
        before = hf.encode(kept, **with_bos)
        pair = (
            (before or [bos], whole[len(before) :])
            if context
            else ([bos], hf.encode(continuation, add_special_tokens=False))
        )
        ((_, wanted),) = score_continuations(
            bundle.model, [pair], sparsity=None if sparsity is None else bundle.sparsity(1), batch_size=2
        )
        assert_close(value, wanted.log_likelihood, "rounding")
        assert greedy == wanted.greedy


@NEEDED
def test_rolling_log_likelihood_counts_every_token_of_a_long_text_once(make, bundle):
    lm = make(bundle, sparsity=None, max_length=16, batch_size=4)
    texts = ["the king and the queen went to the wood. " * 4, "", "one", "a " * 15]
    found = lm.loglikelihood_rolling(asked(*[(each,) for each in texts]))
    for text, value in zip(texts, found, strict=True):
        ids, total = lm.tok_encode(text), 0.0
        for start in range(0, len(ids), 16):
            part = ids[start : start + 16]
            # The last window is full too: it reads tokens before those that it scores.
            context = ([lm.prefix_token_id, *ids])[max(0, start + len(part) - 16) : start + 1]
            ((_, score),) = score_continuations(
                bundle.model, [(context or [lm.prefix_token_id], part)], batch_size=4
            )
            total += score.log_likelihood
        assert_close(value, total, "rounding")


@NEEDED
@pytest.mark.parametrize("sparsity", [None, "auto"])
def test_texts_are_those_of_complete(make, bundle, sparsity):
    lm = make(bundle, sparsity=sparsity, batch_size=2)
    prompts = ["Once upon", "The king", "A", "Once upon a time there was a king"]
    free = [bundle.complete(each, max_new_tokens=12, sparsity=None)[0].text for each in prompts]
    if sparsity is None:
        kwargs = {"until": [], "max_gen_toks": 12}
        stopped = kwargs | {"until": [free[0][3:6], "\x00"]}
        requests = [(each, kwargs) for each in prompts] + [(prompts[0], stopped)]
        found = lm.generate_until(asked(*requests))
        assert found == [*free, free[0][: free[0].index(free[0][3:6])]]
    else:
        found = lm.generate_until(asked(*[(each, {"until": "\x00", "max_gen_toks": 12}) for each in prompts]))
        assert all(found) and found != free


@NEEDED
def test_drawn_texts_follow_the_seed_and_long_contexts_lose_their_beginning(make, bundle):
    kwargs = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    draw = lambda seed: make(bundle, sparsity=None, seed=seed).generate_until(
        asked(*[("Once upon", kwargs)] * 2)
    )
    first = draw(1)
    assert first == draw(1) != draw(2)
    assert first[0] != first[1]
    lm, greedy = make(bundle, sparsity=None), {"max_gen_toks": 8}
    long = "word " * 200 + "The king"
    (cut,) = lm.generate_until(asked((long, greedy)))
    ids = lm.tok_encode(long)[-(64 - 8) :]
    made = pj.generate(
        bundle.model, np.array([ids], np.int32), np.array([len(ids)], np.int32), max_new_tokens=8
    )
    assert bundle.tokenizer.decode_ids(np.asarray(made.tokens)[0].tolist()).startswith(cut)


@NEEDED
def test_conversations_go_through_the_chat_template(make, bundle):
    lm = make(bundle)
    history = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(history) == "<user>Hi<assistant>"
    assert lm.apply_chat_template([*history, {"role": "assistant", "content": "It"}], False).endswith(
        "Hi<assistant>It"
    )
    assert lm.chat_template(True) == TEMPLATE
    with refuses(InputError, "the chat template refuses the messages; got no tools"):
        lm.apply_chat_template([{"role": "tool", "content": "Hi"}])


@NEEDED
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": None, "head_density": 0.5}, InputError, "a head density needs the bundle's own plans"),
        ({"sparsity": "some"}, InputError, "not a sparsity"),
        ({"head_density": 2.0}, SparsityError, "density"),
        ({"batch_size": "many"}, InputError, "batch_size is not usable"),
        ({"max_length": 65}, InputError, "max_length is not usable; got 65, expected 1 to 64"),
        ({"device": "tpu:0"}, InputError, "JAX uses another device"),
        ({"prefix_token_id": -1}, InputError, "no such token"),
        ({"dtype": "float32"}, InputError, "dtype needs a model directory"),
        ({"chat_template_args": "{a}"}, InputError, "chat_template_args: not a Mapping"),
    ],
)
def test_options_that_are_refused(make, bundle, options, error, message):
    with refuses(error, message):
        make(bundle, **options)


@NEEDED
def test_what_a_request_cannot_be(make, bundle):
    lm = make(bundle, sparsity=None, max_length=16)
    with refuses(InputError, "request 1: a continuation is empty"):
        lm.loglikelihood(asked(("a", "b"), ("a", "")))
    with refuses(InputError, "request 0: a continuation is longer than the window"):
        lm.loglikelihood(asked(("a", "word and word " * 16)))
    with refuses(InputError, "max_gen_toks leaves no room for the context; got 256, expected 1 to 15"):
        lm.generate_until(asked(("a", {})))
    with refuses(InputError, "unsupported generation options; got num_beams 3"):
        lm.generate_until(asked(("a", {"num_beams": 3, "max_gen_toks": 4})))
    with refuses(CheckpointError, "has no tokenizer"):
        make(dataclasses.replace(bundle, tokenizer=None))


@NEEDED
@pytest.mark.parametrize(
    ("name", "options"), [("opt-6m", {"prefix_token_id": 5}), ("llama-6m", {"max_length": 32})]
)
def test_answers_are_those_of_the_hf_backend(make, tmp_path, name, options):
    pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = importlib.import_module("lm_eval.models.huggingface").HFLM
        # Batch size 1: in a batch, hf looks for BOS in the first text only and adds one to all or none.
        hf = backend(str(ASSETS / name), dtype="float32", device="cpu", batch_size=1, **options)
    convert_checkpoint(ASSETS / name, tmp_path / "m")
    ours = make(tmp_path / "m", dtype="float32", sparsity=None, batch_size=4, **options)
    bos = ours.tokenizer.bos_token
    pairs = [
        *PAIRS[:-1],
        (f"{bos}def main(", "x)"),
        ("", f"{bos}x"),
        *[("Choose:", f" {each}") for each in "ABCDEFGHIJ"],
    ]
    texts = [("once upon a time there was a king. " * 9,), (f"{bos}hello",)]
    cuts = (
        {"until": ["."], "max_gen_toks": 12},
        {"until": ["the"], "max_gen_toks": 6, "repetition_penalty": 1.3},
    )
    prompts = [(each, cut) for each in ("Once upon a time", "word " * 99, f"{bos}The") for cut in cuts]
    instances = lambda rows: [SimpleNamespace(args=each, task_name=name) for each in rows]
    found, wanted = (lm.loglikelihood(instances(pairs), disable_tqdm=True) for lm in (ours, hf))
    assert_close([value for value, _ in found], [value for value, _ in wanted], "parity")
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    rolling = [lm.loglikelihood_rolling(instances(texts), disable_tqdm=True) for lm in (ours, hf)]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-5)
    assert ours.generate_until(instances(prompts)) == hf.generate_until(instances(prompts))


@pytest.fixture
def evaluate(tmp_path, bundle, capsys, monkeypatch):
    """Runs the verb on a model directory and the shipped task files; exit code, output and errors."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(*words: object) -> tuple[int, str, str]:
        if not (tmp_path / "m").exists():
            pj.save(tmp_path / "m", bundle)
            for name in ("hellaswag", "arc_easy"):
                lines = "\n".join(map(json.dumps, DATA))
                (tmp_path / f"{name}.jsonl").write_text(lines)
            (tmp_path / "lambada.jsonl").write_text(
                "".join(json.dumps({"text": f"the king and {i}"}) + "\n" for i in range(3))
            )
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of lm-eval's libraries
            command.main(["eval", "harness", str(tmp_path / "m"), *map(str, words)])
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run


def test_filters_keep_their_standard_errors_and_their_names(capsys, tmp_path):
    metrics = {"items": 2, "few_shot": 0, "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.25}
    eval_harness._print({"density": None, "tasks": {"sums": metrics | {"acc": 0.75, "acc_stderr": 0.125}}})
    assert "exact_match,strict 0.5000 ± 0.2500, acc 0.7500 ± 0.1250\n" in capsys.readouterr().out
    row = {"doc_id": 0, "target": "4", "filtered_resps": ["4"], "metrics": ["acc"], "acc": 1.0}
    names = ("strict", "flexible")
    eval_harness._write_samples(tmp_path / "rows", {"sums": [row | {"filter": name} for name in names]})
    rows = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert [(row["item"], row["filter"], row["acc"]) for row in rows] == [(0, name, 1.0) for name in names]


def task_files() -> list[object]:
    files = sorted((ROOT / "bench" / "quality" / "tasks").glob("*.yaml"))
    return [word for file in files for word in ("--tasks", file)]


@NEEDED
def test_shipped_tasks_run_offline_and_report_what_they_found(evaluate, tmp_path):
    samples = tmp_path / "samples.jsonl"
    words = [*task_files(), "--data", tmp_path, "--few-shot", 1, "--json"]
    code, out, errors = evaluate(*words, "--dense", "--limit", 4, "--samples", samples)
    assert code == 0, errors
    found = json.loads(out)
    assert (found["density"], found["model_dtype"]) == (None, "float32")
    sizes = {name: (task["items"], task["few_shot"]) for name, task in found["tasks"].items()}
    assert sizes == {"local_arc_easy": (4, 1), "local_hellaswag": (4, 1), "local_lambada": (3, 1)}
    assert 0 <= found["tasks"]["local_hellaswag"]["acc"] <= 1
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 11
    mean = np.mean([row["acc"] for row in rows if row["task"] == "local_arc_easy"])
    assert found["tasks"]["local_arc_easy"]["acc"] == pytest.approx(mean)
    code, out, _ = evaluate(*words, "--head-density", 0.5, "--limit", 2)
    assert (code, json.loads(out)["density"]["groups"] < 1) == (0, True)


@NEEDED
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "missing.yaml"], "no such task file"),
        (["--tasks", "no_such_task_at_all"], "no such task; got no_such_task_at_all"),
        (task_files()[:2], r"the task's data is missing; got no file .*arc_easy.jsonl.* \(--data\)"),
        (["--tasks", "broken.yaml"], "lm-eval can't run this; got"),
        (["--tasks", "list.yaml"], "lm-eval can't run this; got|not a task"),
        (["--tasks", "fields.yaml"], "lm-eval can't run this; got .*absent"),
        (["--tasks", "rows.yaml"], "lm-eval can't run this; got .*JSON"),
        (["--tasks", "nothing.yaml"], "the task's data is empty; got .*nothing.jsonl"),
        (["--tasks", "numbers.yaml"], "lm-eval can't run this; got TypeError"),
        ([*task_files()[:2], "--limit", 0], "--limit is not usable"),
        ([*task_files()[:2], "--dense", "--head-density", 0.5], "contradict each other"),
    ],
)  # fmt: skip
def test_bad_tasks_give_one_line(evaluate, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    task = ROOT.joinpath("bench/quality/tasks/hellaswag.yaml").read_text()
    (tmp_path / "broken.yaml").write_text("task: [unclosed")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "fields.yaml").write_text(task.replace("{{query}}", "{{absent}}"))
    (tmp_path / "rows.yaml").write_text(task.replace("hellaswag.jsonl", "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("{not json\n")
    for name, row in (("nothing", ""), ("numbers", '{"query": "a", "choices": [1, 2], "gold": 0}\n')):
        (tmp_path / f"{name}.yaml").write_text(task.replace("hellaswag.jsonl", f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text(row)
    code, out, errors = evaluate(*words)
    assert (code, out) == (2, "")
    last = errors.splitlines()[-1]
    assert last.startswith("polarjax: ")
    assert re.search(message, last), last
