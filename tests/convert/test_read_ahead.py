"""Ranges of files, read past the page cache and through it."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints_convert import read_ahead as module
from checkpoints_convert.read_ahead import FileRange, read_ahead

SIZE = 3_000_001


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()


@pytest.fixture
def file(tmp_path, data):
    path = tmp_path / "data"
    path.write_bytes(data)
    return path


def forget(file) -> None:
    """Drops a file from the page cache, as far as the system does what it is asked."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def refuse(*_) -> int:
    raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("way", ["direct", "cached", "refused", "unknown"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE)), max_size=7))
def test_bytes_are_those_of_the_file(file, data, way, spans):
    ranges = [FileRange(file, offset, min(size, SIZE - offset)) for offset, size in spans]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_in_page_cache", lambda stream, offset: way == "cached")
        patch.setattr(module, "_SMALL", 1000)
        if way == "refused":
            patch.setattr(os, "open", refuse)
        if way == "unknown":
            patch.setattr(module, "_DIRECT", 0)
        for span, found in zip(ranges, read_ahead(ranges), strict=True):
            assert found.tobytes() == data[span.offset : span.offset + span.size]


def test_direct_access_begins_and_ends_with_pages(file, monkeypatch):
    """Otherwise most file systems refuse it, and nothing would be gained."""
    asked = []
    preadv = os.preadv

    def watch(handle, buffers, offset, *flags):
        (buffer,) = buffers
        asked.append((np.frombuffer(buffer, np.uint8).ctypes.data % 4096, len(buffer) % 4096, offset % 4096))
        return preadv(handle, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", watch)
    for offset, size in [(0, 1 << 21), (77, 1 << 20), (4096, 1_900_003)]:
        module._read_direct(FileRange(file, offset, size), module._pages(size + 8192))
    assert asked == [(0, 0, 0)] * 3


@pytest.mark.parametrize("span", [(SIZE - 2_000_000, 2_500_000), (SIZE, 2_000_000), (SIZE + 5000, 10)])
def test_fewer_where_the_file_ends(file, data, span):
    forget(file)
    (found,) = read_ahead([FileRange(file, *span)])
    assert found.tobytes() == data[span[0] :]


def test_page_cache_is_noticed(file):
    file.read_bytes()
    with open(file, "rb", buffering=0) as stream:
        assert module._in_page_cache(stream, SIZE // 2)


def test_nothing():
    assert list(read_ahead([])) == []


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(read_ahead([FileRange(tmp_path / "none", 0, 1 << 21)]))


def test_can_be_left_early(file, data):
    found = read_ahead([FileRange(file, i, 1 << 20) for i in range(100)])
    assert next(found).tobytes() == data[: 1 << 20]
    found.close()
    assert next(found, None) is None
