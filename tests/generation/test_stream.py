"""Streaming: the tokens of `generate`, piece by piece, by one program, with the cache in place."""

import gc

import jax
import numpy as np
import pytest

import polarjax as pj
from polarjax.generation.stream import CONTEXT
from polarjax.generation.token_loop import CHUNK
from polarjax.text.assembly import TextStream
from tests.model import zoo
from tests.model.test_traces import compilations, prompts
from tests.one_line import refuses

KEY = jax.random.key(3)
SPARSITIES = {
    "dense": None,
    "sparse": pj.Sparsity(zoo.routers("llama-gqa"), zoo.half(zoo.CONFIGS["llama-gqa"])),
}


def _together(pieces: list[pj.Generation], width: int) -> tuple[list[list[int]], np.ndarray]:
    """The rows that pieces add up to, filled up with 0, and their lengths."""
    rows = [[] for _ in pieces[0].lengths]
    for piece in pieces:
        for row, new, length in zip(rows, np.asarray(piece.tokens), piece.lengths, strict=True):
            row += new[:length].tolist()
    return [row + [0] * (width - len(row)) for row in rows], np.array([len(row) for row in rows])


@pytest.mark.parametrize(
    ("kind", "sampler"), [("sparse", pj.Greedy()), ("dense", pj.Categorical(1.2, top_k=20))], ids=str
)
def test_the_pieces_are_what_generate_gives(kind, sampler):
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    settings = {"sampler": sampler, "max_new_tokens": 20, "sparsity": SPARSITIES[kind]}
    free = np.asarray(pj.generate(model, tokens, lengths, KEY, **settings).tokens)
    settings["stop_ids"] = (int(free[0, 4]), int(free[2, 0]))
    whole = pj.generate(model, tokens, lengths, KEY, **settings)
    pieces = list(pj.stream(model, tokens, lengths, KEY, **settings))
    rows, counts = _together(pieces, 20)
    assert rows == whole.tokens.tolist()
    assert counts.tolist() == whole.lengths.tolist()
    assert pieces[-1].stopped.tolist() == whole.stopped.tolist()
    assert [piece.tokens.shape[1] for piece in pieces][:2] == [1, CHUNK]
    assert not any(piece.failed.any() for piece in pieces)


@pytest.mark.parametrize("new", [1, 2 * CHUNK + 1, 2 * CHUNK + 2, 3 * CHUNK])
def test_no_piece_goes_beyond_what_was_asked(new):
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    made = pj.stream(model, tokens, lengths, max_new_tokens=new)
    pieces = list(made)
    assert sum(piece.tokens.shape[1] for piece in pieces) == new
    assert made.finished
    assert list(made) == []


def test_several_sequences_of_each_prompt_and_their_context():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    settings = {"sampler": pj.Categorical(1.5), "max_new_tokens": 9, "num_return_sequences": 2}
    made = pj.stream(model, tokens, lengths, KEY, **settings)
    row, end = np.asarray(tokens)[0], int(lengths[0])
    assert made.context[0] == made.context[1] == row[end - CONTEXT : end].tolist()
    assert made.context[5] == [int(tokens[2, 0])]
    rows, _ = _together(list(made), 9)
    repeated = np.repeat(np.asarray(tokens), 2, 0), np.repeat(np.asarray(lengths), 2)
    settings["num_return_sequences"] = 1
    assert rows == _together(list(pj.stream(model, *repeated, KEY, **settings)), 9)[0]
    assert rows[0] != rows[1]


def test_a_halted_row_ends_and_the_others_are_as_ever():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    whole = pj.generate(model, tokens, lengths, max_new_tokens=20).tokens.tolist()
    made, pieces = pj.stream(model, tokens, lengths, max_new_tokens=20), []
    pieces += [next(made), next(made)]
    made.halt(np.array([False, True, False]))
    rows, counts = _together(pieces + list(made), 20)
    assert counts.tolist() == [20, 1 + CHUNK, 20]
    assert [rows[0], rows[2]] == [whole[0], whole[2]]
    assert rows[1][: 1 + CHUNK] == whole[1][: 1 + CHUNK]


def test_a_stream_ends_once_all_rows_are_halted():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    made = pj.stream(model, tokens, lengths, max_new_tokens=20)
    next(made)
    for wrong in ([True], True, [0, 1], [1, 1, 0], np.ones((3, 1), bool)):
        with refuses(pj.InputError, r"TokenStream.halt: not a choice of rows; .*expected booleans \[3\]"):
            made.halt(wrong)
    made.halt([True, True, False])
    made.halt(np.array([False, False, True]))
    assert made.finished
    assert list(made) == []


def test_fault_19_a_row_that_fails_is_marked():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    broken = zoo.with_rows(model, "final_norm.scale", 0, np.nan)
    (piece,) = pj.stream(broken, tokens, lengths, max_new_tokens=20)
    assert piece.failed.all()
    assert piece.lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", SPARSITIES)
def test_one_compilation_for_all_prompts_of_a_bucket(kind):
    model, settings = zoo.model("llama-gqa"), {"sparsity": SPARSITIES[kind], "stop_ids": (5,)}
    shapes = ((9, 20), (10, 20), (1, 20), (16, 20), (5, 23))  # 20 and 23 new tokens need the same cache
    batches = [(*prompts(3, width, [width, 1, 1]), new) for width, new in shapes]
    for *batch, new in batches[:1]:
        list(pj.stream(model, *batch, max_new_tokens=new, **settings))
    with compilations() as names:
        for *batch, new in batches[1:]:
            list(pj.stream(model, *batch, max_new_tokens=new, **settings))
    assert names == []


@pytest.mark.parametrize("kind", SPARSITIES)
def test_cache_is_donated_between_chunks(kind):
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    made = pj.stream(model, tokens, lengths, max_new_tokens=20, sparsity=SPARSITIES[kind])
    next(made)
    places = lambda cache: {leaf.unsafe_buffer_pointer() for leaf in (*cache.k, *cache.v)}
    before = made._state.cache
    where = places(before)
    next(made)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert places(made._state.cache) == where


def test_fault_30_an_abandoned_stream_frees_its_cache():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    gc.collect()
    before = {id(each) for each in jax.live_arrays()}
    made = pj.stream(model, tokens, lengths, max_new_tokens=20)
    next(made)
    shape = made._state.cache.k[0].shape
    live = lambda: [each for each in jax.live_arrays() if id(each) not in before and each.shape == shape]
    assert live()
    del made
    gc.collect()
    assert live() == []


def test_two_streams_at_once_do_not_disturb_each_other():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    whole = pj.generate(model, tokens, lengths, max_new_tokens=20).tokens.tolist()
    pairs = list(zip(*(pj.stream(model, tokens, lengths, max_new_tokens=20) for _ in range(2)), strict=True))
    assert [_together([pair[i] for pair in pairs], 20)[0] for i in range(2)] == [whole, whole]


BAD = {
    "empty prompt": ({"lengths": np.array([1, 0, 1])}, pj.InputError, "row 1.*length"),
    "too long": ({"max_new_tokens": 99}, pj.InputError, "exceed"),
    "half a token": ({"max_new_tokens": 1.5}, pj.InputError, "max_new_tokens.*got 1.5"),
    "stop id beyond int32": ({"stop_ids": (3_000_000_000,)}, pj.InputError, "stop_ids.*got 3000000000"),
    "no key": ({"sampler": pj.Categorical()}, pj.InputError, "needs a random key"),
    "greedy copies": ({"num_return_sequences": 2}, pj.InputError, "all the same"),
    "other plan": (
        {"sparsity": pj.Sparsity(zoo.routers("llama-gqa"), pj.SparsityPlan((8,), (1,)))},
        pj.SparsityError,
        "got 1 layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_stream_checks_arguments_when_called(case):
    changes, kind, named = BAD[case]
    tokens, lengths = zoo.batch()
    arguments = {"lengths": lengths, "max_new_tokens": 4} | changes
    with refuses(kind, named):
        pj.stream(zoo.model("llama-gqa"), tokens, **arguments)


class Letters:
    """A tokenizer whose ids are letters."""

    def decode_ids(self, ids):
        """One character for each id."""
        return "".join(chr(65 + each) for each in ids)


def _texts(whole: pj.Generation) -> list[str]:
    return [
        Letters().decode_ids(row[:n]) for row, n in zip(whole.tokens.tolist(), whole.lengths, strict=True)
    ]


@pytest.mark.parametrize("kind", SPARSITIES)
def test_fault_23_text_streams_end_at_stop_strings(kind):
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    settings = {"max_new_tokens": 20, "sparsity": SPARSITIES[kind]}
    full = _texts(pj.generate(model, tokens, lengths, **settings))
    stop = full[1][6:10]
    assert all(stop not in text for text in (full[0], full[2]))
    tokens_made = pj.stream(model, tokens, lengths, **settings)
    texts = TextStream(tokens_made, Letters(), stop_strings=[stop])
    shown = ["".join(pieces) for pieces in zip(*texts, strict=True)]
    assert shown[1] == full[1][: full[1].index(stop)]
    alone = len(shown[0]) if kind == "dense" else 1 + 2 * CHUNK  # neurons are chosen for all rows together
    assert [shown[i][:alone] for i in (0, 2)] == [full[i][:alone] for i in (0, 2)]
    done = texts.completions
    assert [each.text for each in done] == shown
    assert [each.ending for each in done] == ["length", "stop_string", "length"]
    assert len(done[1].tokens) == full[1].index(stop) + len(stop)


def test_all_rows_at_a_stop_string_end_the_stream_early():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    texts = _texts(pj.generate(model, tokens, lengths, max_new_tokens=20))
    made = pj.stream(model, tokens, lengths, max_new_tokens=20)
    stream = TextStream(made, Letters(), stop_strings=[text[3:7] for text in texts])
    assert len(list(stream)) == 2
    assert made.finished
    assert [each.text for each in stream.completions] == [text[:3] for text in texts]


def test_a_stop_id_and_failed_rows_have_their_endings():
    model, (tokens, lengths) = zoo.model("llama-gqa"), zoo.batch()
    free = pj.generate(model, tokens, lengths, max_new_tokens=20)
    made = pj.stream(model, tokens, lengths, max_new_tokens=20, stop_ids=(int(free.tokens[0, 2]),))
    texts = TextStream(made, Letters())
    list(texts)
    assert texts.completions[0].ending == "stop_id"
    assert texts.completions[0].text == _texts(free)[0][: len(texts.completions[0].tokens)]
    broken = zoo.with_rows(model, "final_norm.scale", 0, np.nan)
    texts = TextStream(pj.stream(broken, tokens, lengths, max_new_tokens=20), Letters())
    assert list(texts) == [("", "", "")]
    assert {each.ending for each in texts.completions} == {"failed"}
