"""`--mesh`: the command on four devices says what it says on one, for any number of prompts, and refuses meshes that
can't be."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from polarjax.checkpoint.learned import write_plans, write_routers
from polarjax.selection.routers import init_routers
from tests.cli.homes import make_home

ASSET = Path(pj.__file__).parent / "assets" / "opt-6m"
RUN = """
import contextlib, io, json, sys
from polarjax.cli.main import main
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["generate", *words, "--dtype", "float32", "--greedy", "--json"])
        except SystemExit as ended:
            code = ended.code
    found.append([code, json.loads(out.getvalue()).get("texts") if out.getvalue() else err.getvalue()])
print(json.dumps(found))
"""
WAYS = [[], ["--mesh", "data=2,model=2"], ["--mesh", "model=2", "--attention", "sequences"]]
WRONG = {
    "--mesh: more devices than there are; got 8": ["--mesh", "model=8"],
    "--mesh: not a mesh; got 'tensor=2'": ["--mesh", "tensor=2"],
    "8 KV heads (groups) can't be divided": ["--mesh", "model=3"],
    "--attention is for --mesh": ["--attention", "groups"],
}


def in_child(words: list, ways: list[list[str]]) -> list[tuple]:
    """Exit code, and texts or error, of each way of running the verb, on four devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    each = [[*map(str, words), *map(str, way)] for way in ways]
    command = [sys.executable, "-c", RUN, json.dumps(each)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"XLA_FLAGS": flags}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_generate_on_a_mesh(tmp_path):
    convert_checkpoint(ASSET, tmp_path / "model")
    words = [tmp_path / "model", "--prompt", "def main(", "--prompt", "He", "--prompt", "The"]
    found = in_child([*words, "--max-new-tokens", "4"], [*WAYS, *WRONG.values()])
    alone, *spread = found[: len(WAYS)]
    assert alone[0] in (0, None) and len(alone[1]) == 3
    assert spread == [alone] * (len(WAYS) - 1)
    for line, (code, said) in zip(WRONG, found[len(WAYS) :], strict=True):
        last = said.splitlines()[-1]
        assert code == 2 and line in last and ". Hint: " in last


def test_prompts_go_on_where_neurons_are_chosen_for_the_same_rows(run, tmp_path):
    """Groups are in another order on the mesh; parts of a batch would choose neurons of their own."""
    model, whole = make_home(tmp_path), tmp_path / "whole"
    config = pj.load(model).model.config
    L, K = config.num_layers, config.num_kv_heads
    write_routers(model, init_routers(config, jax.random.key(0)))
    few, order = ((config.d_ff // 4,) * L,), ((*range(1, K), 0),) * L
    table = pj.PlanTable(L, config.d_ff, K, (2,), few, ((1.0,) * L,), neuron_shards=2, group_shards=2)
    write_plans(model, dataclasses.replace(table, order=order))
    (tmp_path / "in").write_text("a\nb\nc\n")
    words = ["--prompts", tmp_path / "in", "--slots", "2", "--capacity", "24", "--max-new-tokens", "4"]
    assert run(*words, "--output", whole, "--dtype", "float32", "--greedy", model=model)[0] == 0
    ways = []
    for axis in ("model", "data"):
        (tmp_path / f"{axis}.out").write_bytes(whole.read_bytes()[:-9])
        shutil.copy(tmp_path / "whole.run", tmp_path / f"{axis}.out.run")
        ways.append(["--output", tmp_path / f"{axis}.out", "--mesh", f"{axis}=2"])
    (code, _), refused = in_child([model, *words, "--resume"], ways)
    assert code in (0, None) and (tmp_path / "model.out").read_bytes() == whole.read_bytes()
    assert refused[0] == 2 and "another value of mesh; got None, expected data=2" in refused[1]
