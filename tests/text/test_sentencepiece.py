"""A tokenizer.model gives the ids of SentencePiece itself, through a conversion and without one."""

import functools
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2 as schema

import polarjax as pj
from polarjax.text.tokenizer import Tokenizer
from polarjax.text.tokenizer_files import copy_tokenizer
from tests.one_line import refuses
from tests.text import hf_tokenizers as small

LAST = -1e9
_LETTERS = [("▁a", -1.0), ("▁b", -2.0), ("ab", -3.0), ("▁", LAST), ("a", LAST), ("b", LAST)]
_SPACES = [("▁" * size, LAST) for size in (2, 3, 4, 8, 16)]
_RUNS = ["▁" * size for size in (2, 3, 4)]
_WORDS = ["USR", "US", "<sep>", "ba", "\n"]
_TEXTS = ["a  b", "a", " a", "   ab\n", "b\n    a\n        b", "", "</s", "é a", " " * 37, "   ", "▁", "a▁ "]
_TEXTS += ["USR a", "xUSRy", "aUSUSR", "<sep>", "a<sep> b", "bab", "a<0x0A>", "<0x0A>", "<sep><0x0A><sep>"]
_TEXTS += ["\r\n", "a\r\n\r\nb", "\ufeffa"]
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4


def model(pieces, user=(), *, kind=BPE, more=(), trainer=None, denormalizer=None, **normalizer) -> bytes:
    """A SentencePiece model with three special tokens, 256 bytes, user-defined symbols, the pieces, and typed ones."""
    made = schema.ModelProto()
    made.trainer_spec.model_type = kind
    made.trainer_spec.byte_fallback = True
    made.normalizer_spec.remove_extra_whitespaces = False
    specs = (made.trainer_spec, made.normalizer_spec, made.denormalizer_spec)
    for spec, values in zip(specs, (trainer, normalizer, denormalizer), strict=True):
        for key, value in (values or {}).items():
            setattr(spec, key, value)
    typed = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    typed += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    typed += [(symbol, 0.0, 4) for symbol in user] + [(*each, 1) for each in pieces] + [*more]
    for piece, score, type_ in typed:
        made.pieces.add(piece=piece, score=score, type=type_)
    return made.SerializeToString()


@functools.cache
def nmt_nfkc() -> bytes:
    """The table of SentencePiece's usual normalization."""
    made = io.BytesIO()
    options = {"model_type": "char", "vocab_size": 8, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["ab"]), model_writer=made, **options)
    return schema.ModelProto.FromString(made.getvalue()).normalizer_spec.precompiled_charsmap


_SCORED = [("▁a", -1.0), ("▁b", -2.0), ("ab", -3.0), ("▁", -4.0), ("a", -5.0), ("b", -6.0)]
MODELS = {
    "spaces last": model(_SPACES + _LETTERS),
    "spaces last, long ones first": model(_SPACES[::-1] + _LETTERS),
    "scores against ids": model([*_LETTERS[::-1], ("▁ab", 0.0), ("bab", -0.5), ("ba", -0.7)]),
    "no space at the beginning": model(_SPACES + _LETTERS, add_dummy_prefix=False),
    "single spaces only": model(_SPACES + _LETTERS, remove_extra_whitespaces=True),
    "single spaces, none at the beginning": model(
        _LETTERS, _WORDS, remove_extra_whitespaces=True, add_dummy_prefix=False
    ),
    "unigram": model([*_SCORED, ("▁▁", -2.5), ("<", -7.0), ("0x", -7.0)], kind=UNIGRAM),
    "unigram, bytes' letters only in pieces": model([*_SCORED, ("<0", -7.0), ("A>", -7.0)], kind=UNIGRAM),
    "runs of spaces": model(_SCORED, _RUNS),
    "runs of spaces, unigram": model(_SCORED, _RUNS[:1], kind=UNIGRAM),
    "words": model([*_SCORED, ("<", -7.0), ("0", -7.0), ("<0", -1.0), ("S", -7.0)], _WORDS),
    "words, unigram": model(_SCORED, _WORDS, kind=UNIGRAM),
    "words, none at the beginning": model(_SCORED, _WORDS, add_dummy_prefix=False),
    "pieces that never merge": model([*_SCORED, ("abb", -0.1), ("bb", -9.0), ("▁ab", -2.0)], ["USR"]),
    "characters": model([("▁", -1.0), ("a", -1.0), ("b", -1.0)], [*_RUNS, *_WORDS], kind=CHAR),
    "normalized": model(_SCORED, ["USR"], precompiled_charsmap=nmt_nfkc()),
    "normalized, unigram, lines kept": model(
        _SCORED, ["\n"], kind=UNIGRAM, precompiled_charsmap=nmt_nfkc(), remove_extra_whitespaces=True
    ),
    "unused": model(_SCORED, ["USR"], more=[("zb", 0.0, 5), ("[CTL]", 0.0, 3)]),
    "unused, unigram": model(_SCORED, kind=UNIGRAM, more=[("▁ab", 0.0, 5), ("abb", 0.0, 5), ("[CTL]", 0.0, 3)]),
}  # fmt: skip


def write(folder: Path, data: bytes, settings: dict | None) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(data)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def converted(source: Path, target: Path) -> Tokenizer:
    target.mkdir()
    copy_tokenizer(source, target, model_type="llama", config=small.CONFIGS["llama"])
    return Tokenizer.load(target, model_type="llama")


@pytest.mark.parametrize("settings", [None, small.LLAMA_SETTINGS], ids=["bare", "settings"])
@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(tmp_path, name, settings):
    reference = sentencepiece.SentencePieceProcessor(model_proto=MODELS[name])
    source = write(tmp_path / "hf", MODELS[name], settings)
    ours = converted(source, tmp_path / "out")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    direct = Tokenizer.load(source)
    rng = random.Random(0)
    parts = [" ", "  ", "      ", "a", "b", "\n", "é", "USR", "US", "<sep>", "a▁", "<0x0A>", "\r\n"]
    for text in _TEXTS + ["".join(rng.choices(parts, k=12)) for _ in range(60)]:
        expected = reference.encode(text)
        assert ours.hf.encode(text) == [1, *expected], text
        assert saved.encode(text, add_special_tokens=False).ids == expected, text
        assert direct.hf.encode(text, add_special_tokens=False) == expected, text
        assert ours.decode_ids(expected) == reference.decode(expected)


def test_spaces_that_score_last_merge_after_the_words(tmp_path):
    pieces = [("▁▁", LAST), ("▁a", -1.0), ("▁b", -2.0), ("▁", LAST), ("a", LAST), ("b", LAST)]
    ours = converted(write(tmp_path / "hf", model(pieces), None), tmp_path / "out")
    assert ours.hf.encode("a  b") == [1, 260, 262, 261]


@pytest.mark.parametrize("kind", [BPE, UNIGRAM])
def test_user_defined_symbols_come_first(tmp_path, kind):
    """As Gemma's runs of spaces; the one at the beginning of a text counts."""
    ours = converted(write(tmp_path / "hf", model(_SCORED, _RUNS, kind=kind), None), tmp_path / "out")
    found = [ours.hf.convert_ids_to_tokens(row) for row in ours.ids_of(["a  b", "   "])]
    assert found == [["▁a", "▁▁", "b"], ["▁▁▁▁"]]


@pytest.mark.parametrize("kind", [BPE, UNIGRAM, CHAR])
def test_random_models_agree(tmp_path, kind):
    """Also where pieces, symbols and names of bytes share letters. Between equal scores, rounding decides."""
    rng = random.Random(kind)
    letters = "ab<0x>A▁\n"
    order = sorted if kind == UNIGRAM else list

    def words(count: int, longest: int) -> set[str]:
        return {"".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(count)}

    for i in range(25):
        names = sorted(words(8, 5 if kind != CHAR else 1) | set(letters if kind == BPE else "x"))
        user = sorted(words(rng.randint(0, 4), 4) - set(names))
        scored = [(piece, -rng.uniform(1.0, 20.0)) for piece in names]
        options = {key: rng.random() < 0.5 for key in ("remove_extra_whitespaces", "add_dummy_prefix")}
        data = model(scored, user, kind=kind, **options)
        reference = sentencepiece.SentencePieceProcessor(model_proto=data)
        ours = Tokenizer.load(write(tmp_path / f"{i}", data, small.LLAMA_SETTINGS))
        parts = [*letters, " ", "  ", "é", "<0x0A>", "<0x41>", *user, *names]
        texts = [*user, *names, *("".join(rng.choices(parts, k=8)) for _ in range(30))]
        for text, found in zip(texts, ours.ids_of(texts), strict=True):
            assert order(found) == order(reference.encode(text)), (text, scored, user, options)


@pytest.mark.parametrize("space", [None, True, False])
@pytest.mark.parametrize("legacy", [None, True, False])
def test_settings_of_the_first_space_are_obeyed(tmp_path, space, legacy):
    """They go before the model's, and decide what stands after special tokens, as in transformers."""
    said = {"add_prefix_space": space, "legacy": legacy}
    pieces = [("▁", -1.0), ("a", -2.0), ("b", -3.0)]
    for own in (True, False) if space is not None else (True,):
        data = model(pieces, add_dummy_prefix=own)
        source = write(tmp_path / f"hf{own}", data, small.LLAMA_SETTINGS | said)
        theirs = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        ours = converted(source, tmp_path / f"out{own}")
        for text in ("a", "a</s>b", "</s>b a", "a</s> b", "</s>"):
            ids = ours.hf.encode(text)
            assert ids == theirs.encode(text), text
            assert ours.hf.decode(ids) == theirs.decode(ids)


REFUSED = {
    "model_type word": model(_SCORED, kind=WORD),
    "treat_whitespace_as_suffix true": model(_SCORED, trainer={"treat_whitespace_as_suffix": True}),
    "a denormalizer": model(_SCORED, denormalizer={"precompiled_charsmap": nmt_nfkc()}),
    "escape_whitespaces false": model(_SCORED, escape_whitespaces=False),
    "names of bytes whose characters are only in longer pieces": model(
        [("<0", -1.0), ("x>", -1.0)], kind=UNIGRAM
    ),
    "the piece '▁ab' of type UNUSED": model(_SCORED, more=[("▁ab", 0.0, 5)]),
    "the piece 'z' of type UNUSED": model(_SCORED, kind=UNIGRAM, more=[("z", 0.0, 5)]),
    "the user-defined symbol 'x\\\\n', which its normalizer changes": model(
        _SCORED, ["x\n"], precompiled_charsmap=nmt_nfkc()
    ),
    "the user-defined symbol ' x', which its": model(_SCORED, [" x"], remove_extra_whitespaces=True),
}


@pytest.mark.parametrize("got", REFUSED)
def test_kinds_that_cannot_be_exact_are_refused(tmp_path, got):
    source = write(tmp_path / "hf", REFUSED[got], small.LLAMA_SETTINGS)
    with refuses(pj.CheckpointError, f"hf/tokenizer.model: .*got {got}.*add tokenizer.json"):
        converted(source, tmp_path / "out")


def test_special_tokens_stay_special(tmp_path):
    source = write(tmp_path / "hf", MODELS["spaces last"], small.LLAMA_SETTINGS)
    ours = converted(source, tmp_path / "out")
    ids = ours.hf.encode("a</s>b")
    assert ids[0] == 1 and ids[2:] == [2, ids[3]]
    assert (ours.bos_id, ours.stop_ids) == (1, (2,))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"YQ== 0\nYg== 1\n", "tiktoken vocabulary, not a SentencePiece model.*tokenizer.json"),
        (b"\xff\xff", "hf"),
        (model([("a", -1.0), ("a", -2.0)]), "not a SentencePiece model; got .*a is already defined"),
    ],
    ids=["tiktoken", "damaged", "a piece twice"],
)
def test_other_files_of_that_name(tmp_path, data, words):
    source = write(tmp_path / "hf", data, None)
    with refuses(pj.CheckpointError, words):
        converted(source, tmp_path / "out")
