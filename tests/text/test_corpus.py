"""Reading text, splitting the standard library."""

import contextlib
import lzma
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from polarjax.errors import InputError
from polarjax.text.corpus import (
    Split,
    read_text,
    split_of,
    standard_library_documents,
    standard_library_text,
)
from tests.one_line import refuses

SPLITS = get_args(Split)


def test_reads_plain_and_compressed_text(tmp_path: Path):
    text = "Grüße\r\n\tand tabs\f second"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    assert read_text(tmp_path / "a.txt") == text
    assert read_text(str(tmp_path / "a.txt.xz")) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("latin.txt", b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        ("blank.txt", b" \n\n", "the text is empty"),
        ("noise.txt.xz", b"not an archive", "damaged .xz"),
        ("cut.txt.xz", lzma.compress(b"words " * 1000)[:-20], "damaged .xz"),
    ],
)
def test_refuses_unreadable_text_by_name(tmp_path: Path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "got"), [("/", "a directory"), ("/dev/zero", "a device"), ("a/b", "no such file")]
)
def test_refuses_what_is_no_file(name, got):
    with refuses(InputError, f"^{name}: cannot read the text; got {got}"):
        read_text(name)


@contextlib.contextmanager
def piped(content: bytes) -> Iterator[Path]:
    """A pipe with `content` in it, by the kind of name that `<( )` of a shell gives."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    yield Path(f"/dev/fd/{reader}")
    os.close(reader)


def test_reads_pipes(tmp_path: Path):
    with piped("Grüße".encode()) as path:
        assert read_text(path) == "Grüße"
    named = tmp_path / "named.txt.xz"
    os.mkfifo(named)
    writer = threading.Thread(target=named.write_bytes, args=(lzma.compress(b"words"),))
    writer.start()
    assert read_text(named) == "words"
    writer.join()
    with piped(b"") as path, refuses(InputError, "the text is empty"):
        read_text(path)


def test_known_modules_keep_their_split():
    held_out = {"configparser": "evaluation", "http.server": "evaluation", "inspect": "calibration"}
    assert {name: split_of(name) for name in held_out} == held_out
    assert split_of("argparse") == split_of("asyncio.tasks") == "train"


def test_split_shares():
    names = [f"package.module_{i}" for i in range(4000)]
    share = {split: sum(split_of(n) == split for n in names) / len(names) for split in SPLITS}
    assert share == pytest.approx({"train": 0.8, "calibration": 0.1, "evaluation": 0.1}, abs=0.02)


def test_library_splits_are_disjoint(tmp_path: Path):
    kept = {f"pkg/m{i}.py": f"pkg.m{i}" for i in range(60)} | {"pkg/__init__.py": "pkg", "one.py": "one"}
    left_out = ("test/a.py", "pkg/tests/a.py", "site-packages/x.py", "idlelib/a.py", "a-b.py")
    for path in (*kept, *left_out):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"# {path}\n")
    splits = [standard_library_documents(split, tmp_path) for split in SPLITS]
    assert sum(map(len, splits)) == len(kept)
    assert {name: text for split in splits for name, text in split.items()} == {
        name: f"# {path}\n" for path, name in kept.items()
    }


def test_the_running_library_gives_enough_text():
    train, calibration, evaluation = (standard_library_text(s) for s in SPLITS)
    assert len(train) > 3_000_000
    assert min(len(calibration), len(evaluation)) > 300_000
    assert "class ConfigParser" in evaluation
    assert "class ConfigParser" not in train + calibration


def test_library_without_sources_and_unknown_split_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no sources"):
        standard_library_documents("train", tmp_path)
    with pytest.raises(InputError, match=r"train \| calibration \| evaluation"):
        standard_library_documents("valid")
