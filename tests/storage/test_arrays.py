"""Named arrays on disk: memory that is lent for making them is used again only once they are written."""

import contextlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from polarjax.errors import CheckpointError
from polarjax.storage import arrays as module
from polarjax.storage.array_reader import read_arrays
from polarjax.storage.arrays import ArrayWriter
from polarjax.storage.atomic import atomic_folder


@pytest.mark.parametrize("lent", [True, False])
@pytest.mark.parametrize("batch_bytes", [400, 1000, 1 << 20])
def test_arrays_come_back(tmp_path, lent, batch_bytes):
    rng = np.random.default_rng(0)
    expected = {
        f"array.{i}": rng.standard_normal(size).astype(np.float32)
        for i, size in enumerate(rng.integers(1, 120, 20))
    }
    writer = ArrayWriter(tmp_path / "arrays", batch_bytes=batch_bytes)
    for name, value in expected.items():
        array = writer.reserve(value.nbytes).view(value.dtype) if lent else np.empty_like(value)
        array[:] = value
        writer.add(name, array)
    record = writer.close()
    found = read_arrays(tmp_path / "arrays", record, hint="")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_lent_memory(tmp_path):
    """The same until an array is added; then the next bytes; and what exceeds a batch is memory of its own."""
    writer = ArrayWriter(tmp_path / "arrays", batch_bytes=100)
    first = writer.reserve(40)
    assert first.nbytes == 40
    assert np.shares_memory(first, writer.reserve(20))
    writer.add("first", first)
    second = writer.reserve(40)
    assert not np.shares_memory(first, second)
    writer.add("second", second)
    assert writer.reserve(200).nbytes == 200
    writer.close()


def test_few_files_wait_open_for_their_hash(tmp_path, monkeypatch):
    """A slow hash must not let them grow beyond what a process may hold."""
    checksum, most = module.checksum, 0

    def slow(stream):
        nonlocal most
        files = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                files.append(os.readlink(f"/proc/self/fd/{number}"))
        most = max(most, sum(name.startswith(str(tmp_path)) for name in files))
        time.sleep(0.05)
        return checksum(stream)

    monkeypatch.setattr(module, "checksum", slow)
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(module, "_OPEN", 2)
    writer = ArrayWriter(tmp_path / "arrays", batch_bytes=100)
    for i in range(12):
        writer.add(f"array.{i}", np.full(25, i, np.float32))
    writer.close()
    assert 0 < most <= 2 + 12  # and those of a batch


def test_error_leaves_no_files(tmp_path, monkeypatch):
    """TensorStore goes on with a batch when one file of it has failed, and makes the folders that it misses."""

    def go_on(folder: Path) -> None:
        for i in range(8):
            time.sleep(0.05)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / str(i)).touch()

    def fail(path: str, batch) -> None:
        others.append(threading.Thread(target=go_on, args=[Path(path).parent / "arrays.partial" / "d"]))
        others[0].start()
        raise ValueError("os_error_code='28'")

    others: list[threading.Thread] = []
    monkeypatch.setattr(module.ocp.partial, "save", fail)
    with pytest.raises(CheckpointError, match="No space left"), atomic_folder(tmp_path / "out") as folder:
        writer = ArrayWriter(folder / "arrays")
        writer.add("array", np.zeros(4))
        writer.close()
    others[0].join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a*b?[c]", "a\\b", "a#b%25{c}", "a b\n"])
def test_odd_names(tmp_path, name):
    (tmp_path / name).mkdir()
    with ArrayWriter(tmp_path / name / "arrays") as writer:
        writer.add("array", np.arange(4))
        record = writer.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = read_arrays(tmp_path / name / "arrays", record, hint="")
    np.testing.assert_array_equal(found["array"], np.arange(4))
