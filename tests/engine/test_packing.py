"""What the engine reads next: whole prompts in few shapes, within a number of tokens."""

from collections import deque

import numpy as np
import pytest

from polarjax.engine.packing import Packer
from polarjax.engine.requests import Request, RowSettings

SETTINGS = RowSettings((0.0, 1, 1.0), (), 8, 0, 1.0, None)


def waiting(*lengths, read=0):
    """Requests with prompts of these lengths, each in a slot of its own."""
    made = [Request(i, np.arange(n, dtype=np.int32), SETTINGS, None) for i, n in enumerate(lengths)]
    for i, request in enumerate(made):
        request.slot, request.read = i, read
    return made


@pytest.mark.parametrize(
    ("lengths", "read", "shape", "ids"),
    [
        ((100, 5, 2000, 128, 90), 0, (4, 128), [0, 1, 3, 4]),  # short ones share a call
        ((100, 5, 90), 0, (2, 128), [0, 1]),  # without empty rows
        ((500, 2000, 400, 100), 0, (2, 512), [0, 2]),
        ((300, 300), 0, (1, 384), [0]),  # one by one is quicker
        ((700, 700), 0, (1, 768), [0]),
        ((2000,), 0, (1, 2048), [0]),
        ((3000, 10), 0, (1, 2048), [0]),  # the first part of a long one
        ((200, 10), 150, (1, 128), [0]),  # the rest of one that begins like another
    ],
)
def test_prompts_are_read_together_where_that_is_no_slower(lengths, read, shape, ids):
    requests = waiting(*lengths)
    requests[0].read = read
    packer = Packer(2048, slots=64, capacity=4096, best=None)
    pieces, reading = packer.pack(requests, 2048)
    assert reading.pieces.tokens.shape == shape
    assert [piece.request.id for piece in pieces] == ids
    assert reading.begin == (read == 0)
    assert packer.pack(requests, reading.pieces.tokens.size - 1) is None


def test_slots_of_all_shards_are_used_alike():
    packer = Packer(64, slots=6, capacity=64, best=None, shards=3)
    unused = deque([0, 1, 2, 3, 4, 5])
    assert [packer.next_slot(unused) for _ in range(4)] == [0, 2, 4, 1] and list(unused) == [3, 5]
    assert packer.evenly([0, 1, 4]) == 6 and packer.evenly([0, 2, 4]) == 3


@pytest.mark.parametrize(
    ("most", "slots", "capacity", "shards"),
    [(2048, 64, 4096, 1), (1000, 3, 4096, 1), (300, 8, 200, 1), (4, 2, 40, 1), (2048, 64, 4096, 4)],
)
def test_every_token_is_read_once_in_known_shapes(most, slots, capacity, shards):
    """In the order of each prompt, by the shard of its slot, and no call takes more than it may."""
    packer = Packer(most, slots=slots, capacity=capacity, best=None, shards=shards)
    random, each = np.random.default_rng(0), slots // shards
    known = {tuple(shape) for shape in packer.shapes}
    for _ in range(20):
        requests = waiting(*random.integers(1, capacity, random.integers(1, slots + 1)))
        for request in requests[::3]:
            request.read = int(random.integers(0, len(request.prompt)))
        while going := [request for request in requests if request.unread]:
            pieces, reading = packer.pack(going, most)
            rows, width = reading.pieces.tokens.shape
            assert (rows // shards, width, reading.begin) in known
            assert reading.pieces.tokens.size <= most * shards
            for row, slot in enumerate(np.asarray(reading.pieces.rows)):
                assert slot in (slots, *range(row * shards // rows * each, (row * shards // rows + 1) * each))
            assert pieces[0].request is going[0]
            assert (
                len({id(piece.request) for piece in pieces}) == len(pieces) <= reading.pieces.tokens.shape[0]
            )
            for piece in pieces:
                assert piece.start == piece.request.read
                assert 0 < piece.count <= reading.pieces.tokens.shape[1]
                assert not (reading.begin and piece.start)
                piece.request.read += piece.count
