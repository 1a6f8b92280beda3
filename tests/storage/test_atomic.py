"""What is being made appears whole or not at all, whoever else wants the same place, and whatever is interrupted."""

import errno
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from polarjax.errors import CheckpointError
from polarjax.storage import atomic as storage
from polarjax.storage.atomic import (
    alone,
    atomic_file,
    atomic_folder,
    check_writable,
    remove_stale,
    temporary_folder,
)
from tests.one_line import refuses


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(path: Path, text: str, **options) -> None:
    with atomic_folder(path, **options) as folder:
        (folder / "content").write_text(text)


def content(path: Path) -> str:
    return (path / "content").read_text()


def test_what_is_no_file_is_never_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with refuses(CheckpointError, "pipe: not a file that can be replaced"), atomic_file(pipe, overwrite=True):
        pass
    assert pipe.is_fifo() and names(tmp_path) == ["pipe"]
    stream = tmp_path / "stream"  # as /dev/stdout is one
    with open(tmp_path / "file", "w") as file:
        stream.symlink_to(f"/proc/self/fd/{file.fileno()}")
        with refuses(CheckpointError, "stream: not a file that"), atomic_file(stream, overwrite=True):
            pass
        assert stream.is_symlink()


def test_one_alone_may_write_to_a_place_again_and_again(tmp_path):
    path = tmp_path / "out"
    for text in ("one", "two"):
        with alone(path):
            make(path, text, overwrite=True)
            with refuses(CheckpointError, "out: another process is writing this"), alone(path):
                pass
            remove_stale(path)
            with refuses(CheckpointError, "out: another process is writing this"), alone(path):
                pass
        assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("step", ["_flush", "_put"])
def test_another_leaves_what_is_nearly_finished(tmp_path, monkeypatch, step):
    path, original = tmp_path / "out", getattr(storage, step)

    def watched(*args):
        remove_stale(path)
        original(*args)
        remove_stale(path)

    monkeypatch.setattr(storage, step, watched)
    make(path, "whole")
    assert (names(tmp_path), content(path)) == (["out"], "whole")


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_replacement(tmp_path, monkeypatch, done):
    """Interrupted after so many renames, the old one is there or the new one is, and nothing else."""
    path, rename, calls = tmp_path / "out", Path.rename, itertools.count()
    make(path, "old")

    def interrupted(self, target):
        call = next(calls)
        if call != done:
            rename(self, target)
        if call == min(done, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(path, "new", overwrite=True)
    assert (names(tmp_path), content(path)) == (["out"], "new" if done == 2 else "old")


def test_killed_while_replacing(tmp_path):
    """The next one puts back what the killed one moved aside."""
    path = tmp_path / "out"
    make(path, "old")
    path.rename(tmp_path / ".out.polarjax-tmp-0123abcd.old")
    (tmp_path / ".out.polarjax-tmp-0123abcd").mkdir()
    (tmp_path / ".out.polarjax-tmp-0123abcd.lock").touch()
    with pytest.raises(CheckpointError, match="already exists"), atomic_folder(path):
        pytest.fail("refused before any work")
    assert (names(tmp_path), content(path)) == (["out"], "old")


def test_killed_after_replacing(tmp_path):
    make(tmp_path / "out", "new")
    make(tmp_path / ".out.polarjax-tmp-0123abcd.old", "old")
    make(tmp_path / "out", "newer", overwrite=True)
    assert (names(tmp_path), content(tmp_path / "out")) == (["out"], "newer")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_meanwhile_stays(tmp_path, overwrite):
    path = tmp_path / "out"
    options = {"overwrite": overwrite, "may_replace": lambda path: False}
    match = "refused" if overwrite else "already exists"
    with pytest.raises(CheckpointError, match=match), atomic_folder(path, **options):
        path.mkdir()
        (path / "content").write_text("somebody's")
    assert (names(tmp_path), content(path)) == (["out"], "somebody's")


def test_a_file_that_came_meanwhile_stays(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(CheckpointError, match="already exists"), atomic_file(path) as stream:
        stream.write("ours")
        path.write_text("somebody's")
    assert (names(tmp_path), path.read_text()) == (["out"], "somebody's")


def test_folders_and_files_left_at_the_same_name(tmp_path):
    for i, path in enumerate(tmp_path / f".out.polarjax-tmp-0000000{i}" for i in range(3)):
        path.touch() if i else path.mkdir()
    with atomic_file(tmp_path / "out") as stream:
        stream.write("whole")
    (tmp_path / ".out.polarjax-tmp-00000003").touch()
    make(tmp_path / "out", "whole", overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["file/out", "n" * 250])
def test_a_file_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    for make_it in (atomic_file, atomic_folder):
        with pytest.raises(CheckpointError, match="cannot write here"), make_it(tmp_path / name):
            pass
    assert names(tmp_path) == ["file"]


def test_a_name_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(CheckpointError, match=r"caf\\xe9: the name is not UTF-8"):
        make(path, "whole")
    assert names(tmp_path) == []


@pytest.mark.parametrize("make_it", [atomic_file, atomic_folder])
def test_an_unreadable_source_is_named(tmp_path, make_it):
    """And not the output, which is fine."""
    source, path = str(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(CheckpointError, match=f"{source}: cannot read") as refused, make_it(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), source)
    assert "Permission denied" in str(refused.value)
    assert names(tmp_path) == []


def test_whether_a_folder_can_be_written(tmp_path):
    check_writable(tmp_path)
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: cannot write here"):
        check_writable(tmp_path / "file")


def test_a_read_only_folder_is_named_by_its_whole_path(tmp_path, monkeypatch):
    """And not by a file that is made in it to find out; also where its name is relative."""
    monkeypatch.chdir(tmp_path)

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))

    monkeypatch.setattr(os, "open", refuse)
    for name in ("folder", "./folder/../folder"):
        with refuses(CheckpointError, f"^{tmp_path}/folder: cannot write here; got Permission denied"):
            check_writable(Path(name))


def test_closed_pipe_is_not_a_file_error(tmp_path):
    with pytest.raises(BrokenPipeError), atomic_file(tmp_path / "out"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert names(tmp_path) == []


_HOLD = """
from polarjax.storage.atomic import temporary_folder
with temporary_folder("held") as folder:
    (folder / "data").write_text("x")
    print(folder, flush=True)
    input()
"""


def hold(folder: Path) -> tuple[subprocess.Popen, Path]:
    """A process that has a temporary folder in `folder`, until it reads a line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    held = subprocess.Popen([sys.executable, "-c", _HOLD], env=os.environ | {"TMPDIR": str(folder)}, **pipes)
    return held, Path(held.stdout.readline().strip())


def test_a_killed_process_leaves_its_temporary_folder_to_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (killed, stale), (living, kept) = hold(tmp_path), hold(tmp_path)
    with killed, living:
        killed.kill()
        killed.wait()
        assert (stale / "data").exists()
        with temporary_folder("other"):
            assert (stale / "data").exists()
        with temporary_folder("held") as mine:
            assert list(mine.iterdir()) == [] and mine.stat().st_mode & 0o77 == 0
            assert not stale.exists()
            assert (kept / "data").exists()
        assert not mine.exists()
        living.communicate("\n")
    assert living.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_goes_with_an_error_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), temporary_folder("held") as mine:
        (mine / "sub").mkdir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError), temporary_folder("held"):
        pass
    assert list(tmp_path.iterdir()) == []
