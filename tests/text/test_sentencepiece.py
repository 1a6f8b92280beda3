"""A tokenizer.model gives the ids of SentencePiece itself, through a conversion and without one."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as schema

import polarjax as pj
from polarjax.text.tokenizer import Tokenizer
from polarjax.text.tokenizer_files import copy_tokenizer
from tests.one_line import refuses
from tests.text import hf_tokenizers as small

LAST = -1e9
_LETTERS = [("▁a", -1.0), ("▁b", -2.0), ("ab", -3.0), ("▁", LAST), ("a", LAST), ("b", LAST)]
_SPACES = [("▁" * size, LAST) for size in (2, 3, 4, 8, 16)]
_TEXTS = ["a  b", "a", " a", "   ab\n", "b\n    a\n        b", "", "</s", "é a", " " * 37]


def model(pieces: list[tuple[str, float]], *, unigram: bool = False, **normalizer: bool) -> bytes:
    """A SentencePiece model with three special tokens, 256 bytes and the pieces."""
    made = schema.ModelProto()
    made.trainer_spec.model_type = 1 if unigram else 2
    made.trainer_spec.byte_fallback = True
    made.normalizer_spec.remove_extra_whitespaces = False
    for key, value in normalizer.items():
        setattr(made.normalizer_spec, key, value)
    specials = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    data = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    for piece, score, kind in specials + data + [(*each, 1) for each in pieces]:
        made.pieces.add(piece=piece, score=score, type=kind)
    return made.SerializeToString()


MODELS = {
    "spaces last": model(_SPACES + _LETTERS),
    "spaces last, long ones first": model(_SPACES[::-1] + _LETTERS),
    "scores against ids": model([*_LETTERS[::-1], ("▁ab", 0.0), ("bab", -0.5), ("ba", -0.7)]),
    "no space at the beginning": model(_SPACES + _LETTERS, add_dummy_prefix=False),
    "single spaces only": model(_SPACES + _LETTERS, remove_extra_whitespaces=True),
    "unigram": model([(piece, score / 4) for piece, score in _LETTERS if score > LAST] + [
        ("▁▁", -2.5), ("▁", -3.0), ("a", -4.0), ("b", -5.0)
    ], unigram=True),
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
    parts = [" ", "  ", "      ", "a", "b", "\n", "é"]
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
    ],
    ids=["tiktoken", "damaged"],
)
def test_other_files_of_that_name(tmp_path, data, words):
    source = write(tmp_path / "hf", data, None)
    with refuses(pj.CheckpointError, words):
        converted(source, tmp_path / "out")
