"""Text while it comes: whole characters, exact stop strings, and never a word too early."""

import functools

import hypothesis.strategies as st
import pytest
from hypothesis import given

import polarjax as pj
from polarjax.text.assembly import Assembler, check_stop_strings
from polarjax.text.tokenizer import Tokenizer
from tests.one_line import refuses
from tests.text import hf_tokenizers as small

TEXTS = ["def f(x):\n    return x", "Grüße, 日本 ☃ 🙂🙂", "a  b   c", "é", " leading", "🙂", "తెలుగు లో తె"]
KINDS = ["byte_level", "byte_fallback", "sentencepiece"]
CONTEXT = 8


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """OPT's byte-level kind, and two LLaMA ones that strip the space from the start of every text."""
    folder = tmp_path_factory.mktemp("hf")
    llama = small.LLAMA_SETTINGS
    return {
        "byte_level": Tokenizer.load(small.write_opt(folder / "opt", small.OPT_SETTINGS), model_type="opt"),
        "byte_fallback": Tokenizer.load(small.write_llama(folder / "llama", llama), model_type="llama"),
        "sentencepiece": Tokenizer.load(small.write_sentencepiece(folder / "sp", llama), model_type="llama"),
    }


def _feed(row: Assembler, ids: list[int], sizes: list[int]) -> list[str]:
    """What is shown when the tokens come in pieces of these sizes, over and over."""
    shown, start, turn = [], 0, 0
    while start < len(ids) and not row.stopped:
        size = sizes[turn % len(sizes)]
        shown.append(row.push(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*shown, row.finish()]


SIZES = st.lists(st.integers(1, 8), min_size=1, max_size=3)


def _continued(decode, ids: list[int], cut: int) -> str:
    """What the tokens from `cut` on add to the text of those before; a character that they complete is theirs."""
    prompt, whole = decode(ids[:cut]), decode(ids)
    return whole[next((i for i, each in enumerate(prompt) if whole[i : i + 1] != each), len(prompt)) :]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.sampled_from(TEXTS), where=st.floats(0, 1), sizes=SIZES)
def test_pieces_add_up_to_the_text_wherever_the_prompt_ends(tokenizers, kind, text, where, sizes):
    """Also where the prompt, or the part of it that is decoded with the new tokens, is cut inside a character."""
    decode = tokenizers[kind].decode_ids
    ids = tokenizers[kind].hf.encode(text)
    cut = round(where * (len(ids) - 1))
    row = Assembler.of(tokenizers[kind], ids[max(0, cut - CONTEXT) : cut])
    shown = _feed(row, ids[cut:], sizes)
    assert "".join(shown) == row.text == _continued(decode, ids, cut)
    assert not any("\ufffd" in piece for piece in shown)
    assert row.tokens == ids[cut:]


def _ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens: bytes that are no text, special tokens, pieces of characters."""
    broken = st.sampled_from(["త", "é", "🙂", "日"]).flatmap(
        lambda each: st.sampled_from([each.encode()[:i] for i in range(1, 5)])
    )
    first = {"byte_level": None}.get(kind, 3)  # id of the byte 0
    some = st.lists(st.integers(0, 300), max_size=5)
    pieces = some if first is None else some | broken.map(lambda data: [first + byte for byte in data])
    return st.lists(pieces, min_size=1, max_size=8).map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), where=st.floats(0, 1), sizes=SIZES)
def test_any_tokens_whatever_the_pieces(tokenizers, kind, data, where, sizes):
    decode, ids = tokenizers[kind].decode_ids, data.draw(_ids(kind))
    cut = round(where * len(ids))
    stops = data.draw(st.sampled_from([(), ("not there",)]))  # with one, tokens are taken one by one
    row = Assembler.of(tokenizers[kind], ids[max(0, cut - CONTEXT) : cut], stops)
    assert "".join(_feed(row, ids[cut:], sizes)) == row.text == _continued(decode, ids, cut)


@given(data=st.data())
def test_invalid_utf8_reads_as_in_sentencepiece(tokenizers, data):
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = tokenizers["sentencepiece"]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / "tokenizer.model"))
    ids = [i for i in data.draw(_ids("sentencepiece")) if i >= 3]  # <unk> reads otherwise there
    assert tokenizer.decode_ids(ids) == theirs.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 8, 100])
def test_new_text_after_a_prompt_of_byte_tokens(tokenizers, kind, size):
    """dynamo#12688: the last eight tokens of the prompt begin inside a character."""
    encode = functools.partial(tokenizers[kind].hf.encode, add_special_tokens=False)
    prompt, whole = encode("తెలుగు"), encode("తెలుగులో")
    row = Assembler(tokenizers[kind].decode_ids, context=prompt[-CONTEXT:])
    assert "".join(_feed(row, whole[len(prompt) :], [size])) == row.text == "లో"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_cost_nothing(tokenizers, kind):
    """A model that goes on after its end writes its end a thousand times."""
    tokenizer, decoded = tokenizers[kind], []
    end, text = tokenizer.hf.eos_token_id, tokenizer.hf.encode("One, two.", add_special_tokens=False)
    assert end in tokenizer.silent_ids
    row = Assembler.of(tokenizer, [], ("not there",))
    row._decode = lambda ids: decoded.append(len(ids)) or tokenizer.decode_ids(ids)
    ids = [*text, *[end] * 1000, *text]
    assert "".join(_feed(row, ids, [8])) == row.text == tokenizer.decode_ids(ids)
    assert row.tokens == ids
    assert len(decoded) <= 4 * len(text) + 2


def test_a_character_is_shown_when_its_last_byte_is_there(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    ids = tokenizer.hf.encode("x🙂y", add_special_tokens=False)
    row = Assembler(tokenizer.decode_ids)
    shown = [row.push([each]) for each in ids]
    assert "".join(shown[:-5]) == "x"
    assert shown[-5:] == ["", "", "", "🙂", "y"]


def test_an_unfinished_character_is_shown_at_the_end_only(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    ids = tokenizer.hf.encode("🙂", add_special_tokens=False)[-4:-1]
    row = Assembler(tokenizer.decode_ids)
    assert [row.push([each]) for each in ids] == [""] * 3
    assert set(row.finish()) == {"\ufffd"}


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


@pytest.mark.parametrize("stops", [("bc", "de"), ("de", "bc"), ("c", "bc")])
def test_first_complete_stop_string_of_a_token_counts(stops):
    """A token may hold several: the text ends before the one that is complete first, the longest of those."""
    row = Assembler(lambda ids: "abcdef" * len(ids), stop_strings=stops)
    assert row.push([0]) + row.finish() == row.text == "a"


@given(text=st.text("ab", max_size=30), stop=WORDS)
def test_text_that_cannot_match_a_stop_string_is_shown_at_once(text, stop):
    row, shown = Assembler(_characters, stop_strings=(stop,)), ""
    for i, each in enumerate(text):
        shown += row.push([ord(each)])
        if row.stopped:
            return
        held = text[len(shown) : i + 1]
        assert stop.startswith(held) and held != stop


def test_a_stop_string_across_tokens_and_the_tokens_it_took(tokenizers):
    tokenizer = tokenizers["byte_level"]
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
    with refuses(pj.InputError, r'stop_strings: unusable.*of at least one character, for example "\\n'):
        check_stop_strings(stops)
