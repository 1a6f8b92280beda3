"""Named arrays on disk: memory that is lent for making them is used again only once they are written."""

import numpy as np
import pytest

from polarjax.arrays import ArrayWriter, read_arrays


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
    found = read_arrays(tmp_path / "arrays", record, mend="")
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
