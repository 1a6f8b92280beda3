"""Reads tokenizer.model as SentencePiece does; transformers orders merges by id and drops the normalization."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polarjax.errors import CheckpointError

_UNIGRAM, _BPE = 1, 2  # of TrainerSpec.ModelType
_NORMAL = 1  # of ModelProto.SentencePiece.Type
_SPACE = "▁"


def use_sentencepiece_rules(hf: Any, file: Path) -> None:
    """Makes a transformers tokenizer of `file` produce SentencePiece's ids, including spaces.

    Keeps its special tokens and post-processor. Word and character models are left unchanged.

    Args:
      hf: the transformers tokenizer; modified.
      file: the SentencePiece model.

    Raises:
      CheckpointError: the file is not a SentencePiece model.
    """
    proto = _read(file)
    model = _model(proto)
    if model is None:
        return
    backend = hf.backend_tokenizer
    state = json.loads(backend.to_str())
    prefix = proto.normalizer_spec.add_dummy_prefix
    state |= {"model": model, "normalizer": _normalizer(proto.normalizer_spec), "decoder": _decoder(prefix)}
    state["pre_tokenizer"] = _pre_tokenizer(proto.normalizer_spec)
    hf._tokenizer = type(backend).from_str(json.dumps(state))


def is_tiktoken(file: Path) -> bool:
    """Whether the file is a tiktoken vocabulary: in each line a token in base64 and its rank."""
    with open(file, "rb") as stream:
        words = stream.readline(10_000).split()
    try:
        return len(words) == 2 and words[1].isdigit() and bool(base64.b64decode(words[0], validate=True))
    except ValueError:
        return False


def _read(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()  # pyrefly: ignore[missing-attribute]
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        hint = "download the file again"
        raise CheckpointError("not a SentencePiece model", where=file, got=str(error), hint=hint) from error
    return proto


def _model(proto: Any) -> dict[str, Any] | None:
    """The model in the tokenizers library's format; None for a kind it doesn't support."""
    spec = proto.trainer_spec
    common = {"byte_fallback": spec.byte_fallback}
    if spec.model_type == _UNIGRAM:
        vocab = [[each.piece, each.score] for each in proto.pieces]
        return {"type": "Unigram", "unk_id": spec.unk_id, "vocab": vocab, **common}
    if spec.model_type == _BPE:
        vocab = {each.piece: i for i, each in enumerate(proto.pieces)}
        unknown = proto.pieces[spec.unk_id].piece
        merges = sorted(_merges(proto), key=lambda each: (-each[0], -len(each[1]), -len(each[2])))
        pairs = [[left, right] for _, left, right in merges]
        return {
            "type": "BPE", "unk_token": unknown, "fuse_unk": True, "vocab": vocab, "merges": pairs, **common
        }  # fmt: skip
    return None


def _merges(proto: Any) -> Iterator[tuple[float, str, str]]:
    """Score and halves of every merge. SentencePiece merges the best score first; on a tie, the leftmost.

    The tokenizers library only has an order of merges. Ties are runs of spaces, which grow from the left if longer runs
    come first.
    """
    scores = {each.piece: each.score for each in proto.pieces if each.type == _NORMAL}
    for piece, score in scores.items():
        for i in range(1, len(piece)):
            if piece[:i] in scores and piece[i:] in scores:
                yield score, piece[:i], piece[i:]


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _pre_tokenizer(spec: Any) -> dict[str, Any] | None:
    """Puts a space before a text, even before one that begins with a space; not after a special token.

    `Metaspace` adds none to a text that begins with its own symbol, so the first step uses another symbol. If leading
    spaces were removed, it can't tell which text is first, so every one gets a space.
    """
    if not spec.add_dummy_prefix:
        return None
    scheme = "always" if spec.remove_extra_whitespaces else "first"
    common = {"type": "Metaspace", "split": False}
    before = {**common, "replacement": " ", "prepend_scheme": scheme}
    after = {**common, "replacement": _SPACE, "prepend_scheme": "never"}
    return {"type": "Sequence", "pretokenizers": [before, after]}


def _decoder(prefix: bool) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    steps: list[dict[str, Any]] = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
