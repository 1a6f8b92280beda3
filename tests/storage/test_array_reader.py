"""Arrays are read into parts: each value once, each byte checked, and nothing but what the parts hold."""

import itertools
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

from polarjax.errors import CheckpointError
from polarjax.storage import array_reader as module
from polarjax.storage import arrays, orbax, record
from polarjax.storage.array_reader import StoredArrays, read_arrays
from polarjax.storage.arrays import ArrayWriter
from polarjax.storage.chunks import chunks, whole

ARRAYS = {
    "rows": np.arange(24 * 40, dtype=np.float32).reshape(24, 40),
    "cube": np.random.default_rng(0).standard_normal((6, 8, 2, 16)).astype(ml_dtypes.bfloat16),
    "prime": np.arange(2 * 401, dtype=np.int32).reshape(2, 401),
    "zeros": np.zeros((48, 20), np.float16),
    "few/with a slash": np.arange(5, dtype=np.uint32),
    "scalar": np.asarray(3.5, np.float32),
    "flags": np.arange(700) % 3 == 0,
}


def chunked() -> ocp.Context:
    """How earlier versions wrote: large arrays in chunks of equal shape."""
    context = orbax.saving_context()
    context.array_options.saving.storage_options.chunk_byte_size = 2000
    return context


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Arrays in chunks of 2,000 bytes with checksums of 128, read 300 bytes at a time: the folder and the record."""
    folder = tmp_path_factory.mktemp("stored") / "arrays"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "saving_context", chunked)
        for where in (module, record):
            patch.setattr(where, "BLOCK", 128)
        patch.setattr(module, "PIECE_BYTES", 300)
        patch.setattr(record, "LARGE", 256)
        with ArrayWriter(folder) as writer:
            for name, array in ARRAYS.items():
                writer.add(name, array)
            made = writer.close()
        assert any("crc32" in entry for entry in made["files"].values())
        yield folder, made


def cut(size: int, count: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise(size * i // count for i in range(count + 1)))


@pytest.mark.parametrize("dtype", [None, np.float32])
@pytest.mark.parametrize("counts", [(1, 1), (3, 1), (1, 4), (2, 2), (5, 3)])
@pytest.mark.parametrize("name", ARRAYS)
def test_parts_of_arrays(stored, name, counts, dtype):
    """Along the first two axes, of sizes that chunks and rows don't follow, and in another dtype."""
    array = ARRAYS[name]
    axes = [
        cut(size, min(size, counts[axis]) if axis < 2 else 1)
        for axis, (_, size) in enumerate(whole(array.shape))
    ]
    values = array.reshape(array.shape or 1)
    boxes = {box: values[tuple(slice(*each) for each in box)] for box in itertools.product(*axes)}
    parts = {box: np.zeros(part.shape, dtype or array.dtype) for box, part in boxes.items()}
    for task in StoredArrays(*stored, hint="").tasks(name, parts):
        task()
    for box, part in boxes.items():
        np.testing.assert_array_equal(parts[box], part.astype(parts[box].dtype))


def test_arrays_on_the_device_and_on_the_host(stored):
    found, reader = read_arrays(*stored, hint=""), StoredArrays(*stored, hint="")
    for name, array in ARRAYS.items():
        for one in (found[name], reader.read(name)):
            assert one.dtype == array.dtype and one.shape == array.shape
            np.testing.assert_array_equal(one, array)


@pytest.mark.parametrize("recorded", ["crc32", "sha256"])
def test_a_changed_byte_of_any_chunk_is_found(stored, recorded):
    """Also with a record of earlier versions, whose large files have no other checksum than small ones."""
    folder, made = stored
    if recorded == "sha256":
        made = made | {"files": record.digests(folder, list(made["files"]))}
    found = [each for several in chunks(folder, made["arrays"], hint="").values() for each in several]
    in_files = [each for each in found if each.file]
    assert len(in_files) >= 5
    for i, chunk in enumerate(in_files):
        file, place = folder / chunk.file, chunk.offset + 37 * i % 1400
        data = file.read_bytes()
        file.write_bytes(data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=f"have changed since they were written; got {chunk.file}"):
            read_arrays(folder, made, hint="")
        file.write_bytes(data)
    read_arrays(folder, made, hint="")


@pytest.fixture
def counted(monkeypatch):
    """The bytes that are read into arrays."""
    counts, read = [], os.preadv

    def count(*args):
        counts.append(read(*args))
        return counts[-1]

    monkeypatch.setattr(module.os, "preadv", count)
    return counts


def test_only_the_bytes_of_the_parts_are_read(stored, counted):
    """Of rows, those of the parts and what else is in their blocks; of columns, every row that has some, once."""
    reader, array = StoredArrays(*stored, hint=""), ARRAYS["rows"]
    half = {((0, 12), (0, 40)): np.zeros((12, 40), np.float32)}
    columns = {((0, 24), (10 * i, 10 * i + 10)): np.zeros((24, 10), np.float32) for i in range(4)}
    for parts, least in ((half, array.nbytes // 2), (columns, array.nbytes)):
        counted.clear()
        for task in (tasks := list(reader.tasks("rows", parts))):
            task()
        assert least <= sum(counted) <= least + 2 * 128 * len(tasks)


def test_a_bound_on_what_is_read_ahead(stored, monkeypatch):
    """Arrays wait for earlier ones to be on their devices; one that exceeds the bound is read alone."""
    limit, held, most = 2000, {}, []
    start, finish = module._Reading.start, module._Reading.finish

    def starting(self, *args):
        held[self.name] = self.num_bytes
        most.append(sum(held.values()) if len(held) > 1 else 0)
        start(self, *args)
        assert self.num_bytes == sum(part.nbytes for part in self.parts.values())

    def finishing(self):
        del held[self.name]
        return finish(self)

    monkeypatch.setattr(module, "READ_BYTES", limit)
    monkeypatch.setattr(module._Reading, "start", starting)
    monkeypatch.setattr(module._Reading, "finish", finishing)
    assert read_arrays(*stored, hint="").keys() == ARRAYS.keys()
    assert 0 < max(most) <= limit < ARRAYS["rows"].nbytes and not held


def test_a_cpu_keeps_the_memory_that_was_read_into(tmp_path, monkeypatch):
    made = []

    def empty(*args):
        made.append(real(*args))
        return made[-1]

    real = module._empty
    with ArrayWriter(tmp_path / "arrays") as writer:
        writer.add("large", np.ones((1 << 10, 300), np.float32))
        made_of_it = writer.close()
    monkeypatch.setattr(module, "_empty", empty)
    found = read_arrays(tmp_path / "arrays", made_of_it, hint="")["large"]
    assert found.unsafe_buffer_pointer() == made[0].ctypes.data
    donated = jax.jit(lambda x: x + 1, donate_argnums=0)(found)
    assert float(donated[0, 0]) == 2 and made[0][0, 0] == 1


@pytest.mark.parametrize("change", [{"shape": [40, 24]}, {"dtype": "int32"}])
def test_a_record_of_other_arrays_is_refused(stored, change):
    folder, made = stored
    arrays = made["arrays"] | {"rows": made["arrays"]["rows"] | change}
    with pytest.raises(CheckpointError, match=r"cannot be read; got rows is float32 \[24, 40\]"):
        read_arrays(folder, made | {"arrays": arrays}, hint="")
    with pytest.raises(CheckpointError, match="leaves out files that hold them; got state"):
        read_arrays(folder, made | {"files": {}}, hint="")
    arrays = made["arrays"] | {"more": made["arrays"]["rows"]}
    with pytest.raises(CheckpointError, match=r"cannot be read; got .more/zarr"):
        read_arrays(folder, made | {"arrays": arrays}, hint="")
