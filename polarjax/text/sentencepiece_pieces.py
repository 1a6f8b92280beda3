"""The pieces of a SentencePiece model as a model of the tokenizers library, which knows no types of pieces."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4  # of TrainerSpec.ModelType
NORMAL, USER_DEFINED, UNUSED, BYTE = 1, 4, 5, 6  # of ModelProto.SentencePiece.Type
_BONUS = round(0.1 * 2**20) / 2**20  # for each byte of a user-defined symbol but one


def of_type(proto: Any, *kinds: int) -> dict[str, float]:
    """The pieces of some types and their scores."""
    return {each.piece: each.score for each in proto.pieces if each.type in kinds}


def model(proto: Any) -> dict[str, Any]:
    """The model in the tokenizers library's format; `splits` belongs before it."""
    spec = proto.trainer_spec
    common = {"byte_fallback": spec.byte_fallback}
    if spec.model_type == UNIGRAM:
        return {"type": "Unigram", "unk_id": spec.unk_id, "vocab": _scored(proto), **common}
    vocab = {each.piece: i for i, each in enumerate(proto.pieces)}
    unknown = proto.pieces[spec.unk_id].piece
    merges = sorted(_merges(proto), key=lambda each: (-each[0], -len(each[1]), -len(each[2])))
    pairs = [[left, right] for _, left, right in merges]
    whole = bool(of_type(proto, USER_DEFINED))
    return {
        "type": "BPE", "unk_token": unknown, "fuse_unk": True, "vocab": vocab, "merges": pairs,
        "ignore_merges": whole, **common,
    }  # fmt: skip


def splits(proto: Any, made: Mapping[str, Any], library: Any) -> list[dict[str, Any]]:
    """Pre-tokenizer steps without which the library would find other pieces than SentencePiece.

    BPE: user-defined symbols stand alone and are taken whole, which `ignore_merges` does with every text between two
    of them that is in the vocabulary. Those that SentencePiece spells otherwise are split after their first piece.
    Unigram: the library takes unknown characters together, even to a byte's name, if no character of it is known.

    Args:
      proto: the SentencePiece model.
      made: what `model` made of it.
      library: the tokenizers library's class `Tokenizer`.
    """
    if made["type"] == "Unigram":
        known = "".join(of_type(proto, NORMAL, USER_DEFINED))
        apart = next((each for each in "<0x>" if each not in known), None)
        return [_split(re.escape(apart))] if apart and made["byte_fallback"] else []
    symbols = of_type(proto, USER_DEFINED)
    if not symbols:
        return []
    spelled = dict(_spelled_out(proto, made, library))
    if not spelled:
        return [_split(_any_of(symbols))]
    by_start: dict[str, list[str]] = {}
    for first, rest in spelled.values():
        by_start.setdefault(first, []).append(rest)
    starts = (rf"{re.escape(first)}(?={_any_of(rest)}\z)" for first, rest in by_start.items())
    apart = _split(rf"\A(?:{'|'.join(starts)})")
    return [_split(_any_of(symbols)), *[apart] * max(_depth(word, spelled) for word in spelled)]


def hides_bytes(proto: Any) -> bool:
    """Whether a Unigram model may read unknown characters as a byte's name, which no split can prevent."""
    spec = proto.trainer_spec
    if spec.model_type != UNIGRAM or not spec.byte_fallback:
        return False
    known = of_type(proto, NORMAL, USER_DEFINED)
    return all(each in "".join(known) and each not in known for each in "<0x>")


def unused_by_merging(proto: Any) -> str | None:
    """An UNUSED piece that the library would use: BPE merges it, or Unigram reads it as one character."""
    unused = of_type(proto, UNUSED)
    if proto.trainer_spec.model_type == UNIGRAM:
        return next((each for each in unused if len(each) == 1), None)
    known = of_type(proto, NORMAL, UNUSED) if proto.trainer_spec.model_type == BPE else {}
    return next((each for each in unused if any(_halves(each, known))), None)


def _scored(proto: Any) -> list[list[Any]]:
    """The pieces and scores of a Unigram model, raised so that bytes and special tokens never match a text.

    The library matches every piece, and an unknown character scores 10 below the lowest of all. One amount is added
    per character, known or not, so the paths through a text keep their order. It is so large that pieces that must not
    match are best left with the lowest score: spelling them out is better, even in unknown characters.
    """
    lowest = min(of_type(proto, NORMAL).values(), default=0.0)
    raised = 32.0 - math.floor(lowest)  # a whole number, so that sums of float32 scores stay exact

    def score(each: Any) -> float:
        if each.type == NORMAL:
            return each.score + raised * len(each.piece)
        if each.type == USER_DEFINED:
            return _BONUS * (len(each.piece.encode()) - 1) + raised * len(each.piece)
        return lowest + raised

    return [[each.piece, score(each)] for each in proto.pieces]


def _merges(proto: Any) -> Iterator[tuple[float, str, str]]:
    """Score and halves of every merge. SentencePiece merges the best score first; on a tie, the leftmost.

    The tokenizers library only has an order of merges. Ties are runs of spaces, which grow from the left if longer runs
    come first.
    """
    if proto.trainer_spec.model_type != BPE:
        return
    scores = of_type(proto, NORMAL)
    for piece, score in scores.items():
        for left, right in _halves(piece, scores):
            yield score, left, right


def _halves(piece: str, known: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for i in range(1, len(piece)):
        if piece[:i] in known and piece[i:] in known:
            yield piece[:i], piece[i:]


def _spelled_out(proto: Any, made: Mapping[str, Any], library: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    """Pieces that a text of the same characters doesn't become: each with its first piece or character, and the rest."""
    merging = library.from_str(json.dumps({"model": {**made, "ignore_merges": False}})).model
    data = of_type(proto, BYTE)
    for piece in of_type(proto, NORMAL, BYTE):
        found = merging.tokenize(piece) if len(piece) > 1 else ()
        if len(found) > 1:
            first = piece[0] if found[0].value in data else found[0].value
            yield piece, (first, piece[len(first) :])


def _depth(word: str, spelled: Mapping[str, tuple[str, str]]) -> int:
    """How often a text must be split until no rest of it is taken whole."""
    steps = 0
    while word in spelled:
        word, steps = spelled[word][1], steps + 1
    return steps


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _any_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of the words; a tree, as thousands in a row would be slow."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branches(tree)


def _branches(tree: Mapping[str, Any]) -> str:
    found = [re.escape(letter) + _branches(rest) for letter, rest in tree.items() if letter]
    if len(found) == 1 and "" not in tree:
        return found[0]
    return f"(?:{'|'.join(found)}){'?' if '' in tree else ''}" if found else ""
