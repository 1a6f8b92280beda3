"""Token windows of texts: how they are cut, which tokens are scored, and the bytes that each token stands for."""

from pathlib import Path

import numpy as np
import pytest

import polarjax
from polarjax.errors import InputError
from polarjax.text.token_bytes import encode_with_bytes, words_of
from polarjax.text.token_windows import scored_windows, text_windows, token_stream, windows
from polarjax.text.tokenizer import Tokenizer
from tests.one_line import refuses
from tests.text import hf_tokenizers as made

TEXTS = {
    "ascii": "Hello  world, this\n\tis a test ",
    "chinese": "深度学习模型的稀疏性" * 40,
    "mixed": " déjà vu 👩\u200d🚀 naïve \u00a0Ünïcode\u0301 ﬁne\u3000Ａ  ",
    "special": "<s> one</s>two <s></s>",
}
KINDS = ("opt", "byte-fallback", "sentencepiece", "sentencepiece that trims", "bundled", "no offsets")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """One of every kind of vocabulary."""
    home = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "opt": made.write_opt(home / "opt", made.OPT_SETTINGS),
        "byte-fallback": made.write_llama(home / "llama", made.LLAMA_SETTINGS),
        "sentencepiece": made.write_sentencepiece(home / "sp", made.LLAMA_SETTINGS),
        "sentencepiece that trims": made.write_sentencepiece(home / "trims", made.LLAMA_SETTINGS),
        "bundled": Path(polarjax.__file__).parent / "assets" / "opt-6m",
    }
    from sentencepiece import sentencepiece_model_pb2 as schema

    file = folders["sentencepiece that trims"] / "tokenizer.model"
    proto = schema.ModelProto.FromString(file.read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    file.write_bytes(proto.SerializeToString())
    loaded = {kind: Tokenizer.load(folder) for kind, folder in folders.items()}
    return loaded | {"no offsets": Tokenizer.load(folders["bundled"])}


@pytest.fixture
def tokenizer(tokenizers, kind, monkeypatch) -> Tokenizer:
    if kind == "no offsets":  # those of transformers that are written in Python
        monkeypatch.setattr(type(tokenizers[kind].hf), "is_fast", False)
    return tokenizers[kind]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(tokenizer, text):
    ids, sizes = encode_with_bytes(tokenizer.hf, text)
    assert ids.tolist() == tokenizer.hf.encode(text, add_special_tokens=False)
    assert sizes.min() >= 0
    assert sizes.sum() == len(text.encode())


@pytest.mark.parametrize(
    ("kind", "text", "sizes"),
    [
        ("opt", "深 é", [1, 1, 1, 1, 1, 1]),
        ("byte-fallback", "深é", [0, 1, 1, 1, 1, 1]),
        ("sentencepiece", " é", [0, 1, 1, 1]),
        ("opt", "", []),
    ],
)
def test_a_cut_character_counts_its_bytes_once(tokenizer, text, sizes):
    assert encode_with_bytes(tokenizer.hf, text)[1].tolist() == sizes


@pytest.mark.parametrize("length", [5, 32, 63])
@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_not_scored_and_every_byte_counts_once(tokenizer, length):
    documents = [*TEXTS.values(), "a", "b" * 200]
    cut = scored_windows(["\f".join(documents[:3]), *documents[3:]], tokenizer, length, source="here")
    text = token_stream(
        "\f".join(documents), lambda text: tokenizer.hf.encode(text, add_special_tokens=False), separator=None
    )
    kept = cut.tokens[cut.scored]
    np.testing.assert_array_equal(kept, text[: len(kept)])
    assert len(text) - len(kept) < length
    assert (cut.tokens[~cut.scored] == tokenizer.bos_id).all()
    assert (cut.tokens[:, 0] == tokenizer.bos_id).all() and cut.scored[:, 1].all()
    assert not cut.num_bytes[~cut.scored].any()
    sizes = np.concatenate([encode_with_bytes(tokenizer.hf, each)[1] for each in documents])
    assert cut.scored_bytes(0) == sizes[: len(kept)].sum()
    assert cut.scored_bytes(4) == cut.num_bytes[:, 4:].sum()


@pytest.mark.parametrize("kind", ["opt"])
def test_without_bos_a_window_is_text_alone(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "bos_id", None)
    cut = scored_windows(["深\fabc"], tokenizer, 3, source="here")
    assert cut.scored.all() and cut.tokens.shape == (2, 3)
    assert cut.num_bytes.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert cut.scored_bytes(0) == 4


@pytest.mark.parametrize("kind", ["opt"])
def test_windows_are_spread_over_the_text(tokenizer):
    every = scored_windows(TEXTS.values(), tokenizer, 16, source="here")
    some = scored_windows(TEXTS.values(), tokenizer, 16, most=4, source="here")
    at = np.arange(4) * len(every.tokens) // 4
    for name in ("tokens", "scored", "num_bytes"):
        np.testing.assert_array_equal(getattr(some, name), getattr(every, name)[at])
    np.testing.assert_array_equal(text_windows(TEXTS.values(), tokenizer, 16, source=""), every.tokens)


@pytest.mark.parametrize("kind", ["opt"])
def test_every_second_window_starts_as_prompts_of_a_tokenizer_without_bos_do(tokenizer, monkeypatch):
    assert not tokenizer.bos_is_optional
    every = text_windows(TEXTS.values(), tokenizer, 16, source="")
    monkeypatch.setattr(type(tokenizer), "bos_is_optional", True)
    found = text_windows(TEXTS.values(), tokenizer, 16, source="")
    assert found.shape == every.shape and len(every) > 4
    np.testing.assert_array_equal(found[::2], every[::2])
    np.testing.assert_array_equal(found[1:-1:2, :-1], every[1:-1:2, 1:])
    following = every[2::2, 1]  # the token after a window begins the next one, unless a separator is between
    assert np.mean(found[1:-1:2, -1][: len(following)] == following) > 0.5


@pytest.mark.parametrize("kind", ["opt"])
def test_a_text_that_fills_no_window_is_refused(tokenizer):
    ids = tokenizer.hf.encode("abcdef", add_special_tokens=False)
    got = f"here: the text is too short; got {len(ids)} tokens, expected at least {len(ids) + 1} tokens"
    with refuses(InputError, got):
        text_windows(["abcdef"], tokenizer, len(ids) + 2, source="here")
    assert text_windows(["abcdef"], tokenizer, len(ids) + 1, source="here").shape == (1, len(ids) + 1)
    with refuses(InputError, "here: the text is too short; got 0 tokens"):
        text_windows(["\f"], tokenizer, 4, source="here")


def test_token_stream_puts_the_separator_before_each_document():
    stream = token_stream("ab\fc\f \f", lambda text: [ord(c) for c in text], separator=1)
    assert stream.dtype == np.int32
    assert stream.tolist() == [1, 97, 98, 1, 99]
    assert token_stream("ab\fc", lambda text: [5] * len(text), separator=None).tolist() == [5, 5, 5]
    assert token_stream("", lambda text: [5], separator=1).tolist() == []


def test_windows_drop_the_tail_and_take_a_first_token():
    plain = windows(np.arange(11), 4)
    assert plain.dtype == np.int32
    assert plain.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(range(7), 4, first=9).tolist() == [[9, 0, 1, 2], [9, 3, 4, 5]]


def test_short_text_is_refused_with_the_numbers():
    with pytest.raises(InputError, match=r"story.txt: .*got 7 tokens, expected at least 8 tokens"):
        windows(range(7), 4, at_least=2, source="story.txt")
    with pytest.raises(InputError, match="window is too short"):
        windows(range(7), 1, first=0)


@pytest.mark.parametrize("kind", ["bundled", "sentencepiece that trims"])
@pytest.mark.parametrize("stride", [None, 5, 1])
def test_overlapping_windows_score_each_token_once(tokenizer, stride):
    texts = ["one two three four five six seven eight", TEXTS["mixed"], TEXTS["ascii"]]
    apart = scored_windows(texts, tokenizer, 8, source="t")
    found = scored_windows(texts, tokenizer, 8, stride=stride, source="t")
    first = tokenizer.bos_id is not None
    assert (found.tokens[:, 0] == found.bos).all() if first else found.bos is None
    assert found.scored[0, first:].all() == apart.scored[0, first:].all()
    assert found.scored[1:].sum(1).max() <= found.stride + 1  # a window never begins with a document's BOS
    new = found.tokens[found.scored]
    whole = [token for text in texts for token in encode_with_bytes(tokenizer.hf, text)[0]]
    assert new.tolist() == whole[: len(new)]
    assert len(whole) - len(new) < found.tokens.shape[1]  # only the tail is dropped
    sizes = np.concatenate([encode_with_bytes(tokenizer.hf, text)[1] for text in texts])
    assert found.num_bytes.sum() == sizes[: len(new)].sum()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_words_of_all_tokens_are_those_of_the_text(tokenizer, text):
    found = words_of(text, encode_with_bytes(tokenizer.hf, text)[1])
    assert found.min() >= 0
    assert found.sum() == len(text.split())


@pytest.mark.parametrize("stride", [0, -1, 8])
@pytest.mark.parametrize("kind", ["bundled"])
def test_a_stride_that_leaves_out_text_is_refused(tokenizer, stride):
    with refuses(InputError, "stride: not a stride between windows; .* expected 1 to 7"):
        scored_windows(["word " * 99], tokenizer, 8, stride=stride, source="t")
