"""Prompts on Ray Data, if Ray is installed: the README's example with an actor killed, and batches of all kinds."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from polarjax.checkpoint.loading import load
from polarjax.engine.engine import Engine
from polarjax.errors import InputError, SparsityError
from polarjax.jobs import CompletePrompts
from tests.cli.homes import make_home
from tests.one_line import refuses
from tests.test_readme import README, snippets

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
SIZES = {"slots": 2, "max_new_tokens": 16}
ROWS = [{"id": i, "prompt": f"def f{i % 17}(", "temperature": 1.0 if i % 3 else None} for i in range(35)]
DYING = """
import os, signal
from polarjax.jobs import CompletePrompts

class Dying(CompletePrompts):
    batches = 0
    def __call__(self, batch):
        made = super().__call__(batch)
        self.batches += 1
        if self.batches == 2 and not os.path.exists("killed"):
            try:
                open("killed", "x").close()
            except FileExistsError:  # the other actor was faster
                return made
            os.kill(os.getpid(), signal.SIGKILL)
        return made
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def complete(home):
    return CompletePrompts(home, **SIZES)


def table(rows: list[dict]):
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def test_the_readmes_example_with_a_killed_actor_loses_and_doubles_nothing(home, complete, tmp_path):
    (tmp_path / "model").symlink_to(home)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "dying.py").write_text(DYING)
    (example,) = [each.text for each in snippets(README.read_text()) if "import ray\n" in each.text]
    example = example.replace("256", "5").replace(
        "from polarjax.jobs import CompletePrompts", "from dying import Dying as CompletePrompts"
    )
    quiet = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=os.environ | quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=570,  # 30 seconds alone, two minutes beside another worker
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "killed").exists()
    import pyarrow.dataset

    made = pyarrow.dataset.dataset(tmp_path / "answers").to_table().to_pylist()
    assert sorted(made, key=lambda row: row["id"]) == complete(table(ROWS)).to_pylist()


def test_a_row_is_answered_as_an_engine_does(home, complete):
    given = {"prompt": [5, 6, 7], "logprobs": 2, "max_new_tokens": 3}
    (row,) = complete(table([given])).to_pylist()
    with Engine(load(home), slots=2) as engine:
        engine.submit(**given)
        events = list(engine)
    (answer,) = row["completions"]
    assert answer["logprobs"]["tokens"] == [token for event in events for token in event.tokens]
    assert answer["text"] == "".join(event.text for event in events)
    assert (answer["tokens"], answer["ending"]) == (3, "length")


def test_rows_have_settings_of_their_own_or_an_error(complete):
    rows = [
        {"prompt": "def f", "stop_ids": [2889]},
        {"messages": [{"role": "user", "content": "hi", "name": None}]},
        {"prompt": "def f", "temperature": 0.8, "seed": 3},
        {"prompt": "x " * 80},
        {"prompt": "x", "top_p": 2.0},
        {"prompt": None},
    ]
    names = ("prompt", "messages", "max_new_tokens", "stop_ids", "temperature", "seed", "top_p")
    made = complete(
        table([{name: ({"max_new_tokens": 4} | row).get(name) for name in names} for row in rows])
    )
    made = made.to_pylist()
    answers = [row["completions"] for row in made]
    assert [each and each[0]["tokens"] for each in answers] == [1, 4, 4, None, None, None]
    assert answers[0][0]["ending"] == "stop_id"
    assert [row["error"] is None for row in made] == [True] * 3 + [False] * 3
    for row, says in zip(made[3:], ("would exceed", "top_p is out of range", "neither"), strict=True):
        assert row["error"].startswith("row: ") and says in row["error"]
    (binary,) = complete(table([{"prompt": b"x", "id": b"kept"}])).to_pylist()
    assert binary["id"] == b"kept"
    assert "not JSON; got Object of type bytes" in binary["error"]


def test_draws_depend_on_the_row_alone_in_any_batch_and_format(complete):
    rows = [{"id": i, "prompt": f"p{i % 2}", "temperature": 1.0, "top_k": 9} for i in range(4)]
    rows[1]["top_k"] = None  # NumPy and pandas then hold the whole numbers as floats
    whole = complete(table(rows))
    texts = [row["completions"][0]["text"] for row in whole.to_pylist()]
    assert len(set(texts)) == len(texts)
    again = [complete(table(rows[i : i + 1])) for i in (3, 1, 0, 2)]
    assert [each.to_pylist()[0]["completions"][0]["text"] for each in again] == [
        texts[i] for i in (3, 1, 0, 2)
    ]
    columns = {name: np.array([row[name] for row in rows]) for name in ("id", "prompt", "temperature")}
    columns["top_k"] = np.array([9, np.nan, 9, 9])
    lists = {name: column.tolist() for name, column in columns.items()}
    for batch in (columns, lists, table(rows).to_pandas()):
        made = complete(batch)
        assert made.schema.field("completions") == whole.schema.field("completions")
        assert [row["completions"][0]["text"] for row in made.to_pylist()] == texts


def test_batches_have_one_schema(complete):
    empty = complete(table(ROWS).slice(0, 0))
    failed = complete(table([{"id": 1, "prompt": "x", "temperature": -1.0}]))
    fine = complete(table(ROWS[:1] + ROWS[1:2]))
    assert empty.schema == failed.schema == fine.schema
    assert complete(fine).schema == fine.schema  # answers are replaced, not added again


@pytest.mark.parametrize(
    "batch", ["rows", {"text": np.array(["a"])}, {"text": np.zeros(0)}], ids=["text", "columns", "empty"]
)
def test_batches_without_prompts_are_refused(complete, batch):
    with refuses(InputError, "CompletePrompts: (not a batch|the rows have no prompts)"):
        complete(batch)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1}, "CompletePrompts: temperature"),
        ({"greedy": True, "top_k": 3}, "greedy and sampling contradict each other"),
        ({"dense": True, "head_density": 0.5}, "dense and head_density contradict each other"),
        ({"head_density": 0.5}, "the model has no routers yet"),
        ({"logprobs": 99}, "logprobs"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ""}, "stop_strings"),
        ({"seed": "x"}, "seed"),
        ({"stop_ids": range(17)}, "CompletePrompts: stop_ids: too many stop ids; got 17"),
        ({"dtype": "int8"}, "dtype"),
        ({"mesh": "model=64"}, "CompletePrompts: mesh: more devices than there are"),
        ({"mesh": "heads=2"}, "CompletePrompts: mesh: not a mesh"),
        ({"mesh": 4}, "CompletePrompts: mesh: not a mesh; got 4, .* for example data=1,model=4"),
    ],
    ids=str,
)
def test_bad_options_are_refused(home, options, says):
    with refuses(SparsityError if options == {"head_density": 0.5} else InputError, says):
        CompletePrompts(home, **options)


def test_several_greedy_completions_are_refused(home):
    several = CompletePrompts(home, num_return_sequences=2, **SIZES)
    with refuses(InputError, "greedy sequences of one prompt are all the same"):
        several(table([{"prompt": "a"}]))
    (row,) = several(table([{"prompt": "a", "temperature": 1.0}])).to_pylist()
    assert len({each["text"] for each in row["completions"]}) == 2
