"""Text while it comes: whole characters, exact stop strings, and never a word too early."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

import polarjax as pj
from polarjax.text.assembly import Assembler, check_stop_strings
from polarjax.text.tokenizer import Tokenizer
from tests import hf_tokenizers as small
from tests.one_line import refuses

OPT = Path(pj.__file__).parent / "assets" / "opt-6m"
TEXTS = ["def f(x):\n    return x", "Grüße, 日本 ☃ 🙂🙂", "a  b   c", "é", " leading", "🙂"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A byte-level tokenizer, and one with byte fallback and a space stripped from the start of every text."""
    folder = small.write_llama(tmp_path_factory.mktemp("hf") / "llama", small.LLAMA_SETTINGS)
    return {"opt": Tokenizer.load(OPT), "llama": Tokenizer.load(folder, model_type="llama")}


def _feed(row: Assembler, ids: list[int], sizes: list[int]) -> list[str]:
    """What is shown when the tokens come in pieces of these sizes, over and over."""
    shown, start, turn = [], 0, 0
    while start < len(ids) and not row.stopped:
        size = sizes[turn % len(sizes)]
        shown.append(row.push(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*shown, row.finish()]


SIZES = st.lists(st.integers(1, 8), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("text", TEXTS)
@given(sizes=SIZES)
def test_pieces_add_up_to_the_text_and_hold_no_half_character(tokenizers, kind, text, sizes):
    tokenizer = tokenizers[kind]
    ids = tokenizer.hf.encode(text)[1:]
    row = Assembler(tokenizer.decode_ids)
    shown = _feed(row, ids, sizes)
    assert "".join(shown) == row.text == tokenizer.decode_ids(ids)
    assert not any("\ufffd" in piece for piece in shown)
    assert row.tokens == ids


@given(ids=st.lists(st.integers(0, 299), max_size=40), sizes=SIZES)
def test_any_tokens_whatever_the_pieces(tokenizers, ids, sizes):
    """Bytes that are no text, and special tokens among them: the pieces still add up to what decoding gives."""
    row = Assembler(tokenizers["opt"].decode_ids)
    assert "".join(_feed(row, ids, sizes)) == tokenizers["opt"].decode_ids(ids)


def test_a_character_is_shown_when_its_last_byte_is_there(tokenizers):
    tokenizer = tokenizers["llama"]
    ids = tokenizer.hf.encode("x🙂y", add_special_tokens=False)
    row = Assembler(tokenizer.decode_ids)
    shown = [row.push([each]) for each in ids]
    assert "".join(shown[:-5]) == "x"
    assert shown[-5:] == ["", "", "", "🙂", "y"]


def test_an_unfinished_character_is_shown_at_the_end_only(tokenizers):
    tokenizer = tokenizers["llama"]
    ids = tokenizer.hf.encode("🙂", add_special_tokens=False)[-4:-1]
    row = Assembler(tokenizer.decode_ids)
    assert [row.push([each]) for each in ids] == [""] * 3
    assert set(row.finish()) == {"\ufffd"}


@pytest.mark.parametrize("kind", ["opt", "llama"])
@given(cut=st.integers(1, 10), sizes=SIZES)
def test_with_its_context_a_continuation_keeps_its_leading_space(tokenizers, kind, cut, sizes):
    tokenizer = tokenizers[kind]
    ids = tokenizer.hf.encode("the quick brown fox  is a test", add_special_tokens=False)
    cut = min(cut, len(ids) - 1)
    row = Assembler(tokenizer.decode_ids, context=ids[max(0, cut - 8) : cut])
    _feed(row, ids[cut:], sizes)
    assert tokenizer.decode_ids(ids[:cut]) + row.text == tokenizer.decode_ids(ids)


def _characters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def _stopped_early(text: str, stops: list[str]) -> str | None:
    """Character by character: the text before the first stop string to be complete."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return None


WORDS = st.text("ab", min_size=1, max_size=4)


@given(text=st.text("ab", max_size=30), stops=st.lists(WORDS, min_size=1, max_size=3), sizes=SIZES)
def test_fault_23_stop_strings_are_cut_exactly_and_never_shown(text, stops, sizes):
    row = Assembler(_characters, stop_strings=tuple(stops))
    shown = _feed(row, list(map(ord, text)), sizes)
    expected = _stopped_early(text, stops)
    assert row.stopped == (expected is not None)
    assert row.text == "".join(shown) == (text if expected is None else expected)


@given(text=st.text("ab", max_size=30), stop=WORDS)
def test_what_cannot_become_a_stop_string_is_shown_at_once(text, stop):
    row, shown = Assembler(_characters, stop_strings=(stop,)), ""
    for i, each in enumerate(text):
        shown += row.push([ord(each)])
        if row.stopped:
            return
        held = text[len(shown) : i + 1]
        assert stop.startswith(held) and held != stop


def test_a_stop_string_across_tokens_and_the_tokens_it_took(tokenizers):
    tokenizer = tokenizers["opt"]
    ids = tokenizer.hf.encode("x = 1\n\nprint(x)", add_special_tokens=False)
    row = Assembler(tokenizer.decode_ids, stop_strings=("1\n\npr",))
    row.push(ids)
    assert row.stopped
    assert row.text == "x = "
    assert row.tokens == ids[: len(row.tokens)]
    assert "1\n\npr" in tokenizer.decode_ids(row.tokens)
    assert "1\n\npr" not in tokenizer.decode_ids(row.tokens[:-1])
    assert row.push([5]) == row.finish() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], "ab", [3]])
def test_unusable_stop_strings(stops):
    with refuses(pj.InputError, "stop_strings: unusable"):
        check_stop_strings(stops)
