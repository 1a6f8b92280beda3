"""Files of lines that are continued: nothing that was written is lost or doubled, wherever the process was killed."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from polarjax.errors import CheckpointError
from polarjax.storage import line_file
from polarjax.storage.line_file import LineFile, LineStream, check_record, record_path
from tests.one_line import refuses

LINES = ['{"a": "日本"}', "", '{"b": 1}', "x" * 40]
WHOLE = "".join(line + "\n" for line in LINES).encode()


def test_a_file_cut_anywhere_goes_on_after_its_last_whole_line(tmp_path: Path):
    path = tmp_path / "out"
    for cut in range(len(WHOLE) + 1):
        path.write_bytes(WHOLE[:cut])
        with LineFile(path) as file:
            found = list(file.lines())
            assert found == LINES[: WHOLE[:cut].count(b"\n")]
            for line in LINES[len(found) :]:
                file.write(line)
        assert path.read_bytes() == WHOLE


def test_lines_are_in_the_file_at_once(tmp_path: Path):
    """A process is killed between lines, and while one is being written."""
    program = (
        "import os, signal, sys, pathlib\n"
        "from polarjax.storage.line_file import LineFile\n"
        "file = LineFile(pathlib.Path(sys.argv[1]))\n"
        "file.write('first')\n"
        "os.write(file._stream.fileno(), b'tor')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "new" / "out"
    done = subprocess.run([sys.executable, "-c", program, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"first\ntor"
    with LineFile(path) as file:
        assert list(file.lines()) == ["first"]
        file.write("second")
    assert path.read_bytes() == b"first\nsecond\n"


class Full(io.RawIOBase):
    """Takes three bytes at a time, `room` in all."""

    def __init__(self, stream: io.RawIOBase, room: int) -> None:
        self._stream, self._room = stream, room

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, data) -> int:
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(3, self._room, len(data))
        self._room -= count
        return self._stream.write(data[:count])


def test_a_full_disk_leaves_whole_lines(tmp_path: Path):
    for room in range(len(WHOLE)):
        path = tmp_path / str(room)
        with LineFile(path) as file:
            stream, file._stream = file._stream, Full(file._stream, room)
            with refuses(CheckpointError, f"{room}: cannot write here; got No space left.*--resume"):
                for line in LINES:
                    file.write(line)
            file._stream = stream
        assert path.read_bytes() == WHOLE[: WHOLE[:room].rfind(b"\n") + 1]


def test_one_process_writes_at_a_time(tmp_path: Path):
    with LineFile(tmp_path / "out") as file:
        file.write("a")
        with refuses(CheckpointError, "out: another process is writing this"):
            LineFile(tmp_path / "out")
    with LineFile(tmp_path / "out") as file:
        assert list(file.lines()) == ["a"]


def test_lines_stay_if_their_new_record_cannot_be_written(tmp_path: Path, monkeypatch):
    with LineFile(tmp_path / "out") as file:
        file.write("a")

        def full(stream, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(line_file, "dump_json", full)
        with refuses(CheckpointError, "out.run: cannot write here; got No space left"):
            file.begin({})
        assert list(file.lines()) == ["a"]


@pytest.mark.parametrize("kind", ["folder", "no folder"])
def test_what_cannot_be_written_is_refused(tmp_path: Path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "file" / "out"
    (tmp_path / "file").touch()
    with refuses(CheckpointError, "cannot write here"):
        LineFile(path)


def test_a_pipe_that_nobody_reads_is_left_to_the_command():
    reader, writer = os.pipe()
    os.close(reader)
    with LineStream(io.FileIO(writer, "w"), "a pipe") as stream, pytest.raises(BrokenPipeError):
        stream.write("a")


def test_the_record_names_what_differs(tmp_path: Path):
    path, record = tmp_path / "out", {"file": "abc", "seed": 0, "stop": ["a"], "system": None}
    check = lambda **other: check_record(path, record | other, may_be_unknown=("file",))

    def begin(record) -> None:
        with LineFile(path) as file:
            file.begin(record)

    with refuses(CheckpointError, "out.run: the record of the output is missing"):
        check()
    begin(record)
    assert line_file.is_record(record_path(path))
    check()
    check(file=None)
    for name, other in {"file": "abd", "seed": 1, "stop": [], "system": "x", "new": 1}.items():
        with refuses(
            CheckpointError, f"out: the output was begun with another value of {name}; got .*, expected "
        ):
            check(**{name: other})
    begin(record | {"old": 1})
    with refuses(CheckpointError, "another value of old; got 1, expected None"):
        check()
    record_path(path).write_text("{")
    with refuses(CheckpointError, "out.run: not readable as JSON"):
        check()
    assert not line_file.is_record(record_path(path))
    assert {each.name for each in tmp_path.iterdir()} == {"out", "out.run"}
    assert line_file.is_stream(Path("/dev/null")) and not line_file.is_stream(path)
