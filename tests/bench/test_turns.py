"""Processes that measure in turns: one at a time, together from one measurement to the next, and not held up by one
that ends."""

from bench.turns import Job, groups, run

MEMBER = """
import sys, time
from pathlib import Path
from bench.turns import Turns

log, flag, folder, name, members = sys.argv[1:]
turn = Turns(Path(folder), name, int(members))

def write(what):
    with open(log, "a") as file:
        file.write(what + " ")

def measure():
    write("begin")
    time.sleep(0.05)
    write("end")
    return 1.5

if name == "fails":
    raise SystemExit("on purpose")
assert turn(measure) == 1.5
write("next")
assert turn(measure) == 1.5
"""


def test_one_measures_at_a_time_and_nobody_waits_for_one_that_ended(tmp_path):
    log = tmp_path / "log"
    run([Job(name, ("-c", MEMBER, str(log)), 0) for name in ("a", "fails", "b")])
    words = log.read_text().split()
    both = ["begin", "end"]
    assert [word for word in words if word != "next"] == both * 4
    assert words[:4] == both * 2  # nobody goes on before both have measured
    assert words.count("next") == 2


def test_groups_fit_and_hold_every_job():
    jobs = [Job(str(size), (), size) for size in (20, 90, 30, 120, 31, 50)]
    found = [[job.memory for job in group] for group in groups(jobs, room=140, most=2)]
    assert found == [[120, 20], [90, 50], [31, 30]]
    assert [[job.memory for job in group] for group in groups([Job("", (), 200)], room=140, most=2)] == [
        [200]
    ]
