"""`--mesh`: the command on four devices says what it says on one, for any number of prompts, and refuses meshes that
can't be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polarjax as pj
from checkpoints_convert import convert_checkpoint

ASSET = Path(pj.__file__).parent / "assets" / "opt-6m"
RUN = """
import contextlib, io, json, sys
from polarjax.cli.main import main
words = ["generate", sys.argv[1], "--prompt", "def main(", "--prompt", "He", "--prompt", "The"]
words += ["--max-new-tokens", "4", "--dtype", "float32", "--greedy", "--json"]
found = []
for more in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([*words, *more])
        except SystemExit as ended:
            code = ended.code
    found.append([code, json.loads(out.getvalue())["texts"] if out.getvalue() else err.getvalue()])
print(json.dumps(found))
"""
WAYS = [[], ["--mesh", "data=2,model=2"], ["--mesh", "model=2", "--attention", "sequences"]]
WRONG = {
    "--mesh: more devices than there are; got 8": ["--mesh", "model=8"],
    "--mesh: not a mesh; got 'tensor=2'": ["--mesh", "tensor=2"],
    "8 KV heads (groups) can't be divided": ["--mesh", "model=3"],
    "--attention is for --mesh": ["--attention", "groups"],
}


def test_generate_on_a_mesh(tmp_path):
    convert_checkpoint(ASSET, tmp_path / "model")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", RUN, tmp_path / "model", json.dumps([*WAYS, *WRONG.values()])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"XLA_FLAGS": flags}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    alone, *spread = found[: len(WAYS)]
    assert alone[0] in (0, None) and len(alone[1]) == 3
    assert spread == [alone] * (len(WAYS) - 1)
    for line, (code, said) in zip(WRONG, found[len(WAYS) :], strict=True):
        last = said.splitlines()[-1]
        assert code == 2 and line in last and ". Hint: " in last
