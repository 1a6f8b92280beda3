"""Reads tokenizer.model as SentencePiece does; transformers orders merges by id and drops the normalization."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polarjax.errors import CheckpointError
from polarjax.text import sentencepiece_pieces as pieces
from polarjax.text.sentencepiece_charsmap import Charsmap

_SPACE = "▁"
_HINT = "add tokenizer.json, from a copy of this model that has it"


def use_sentencepiece_rules(hf: Any, file: Path, settings: Mapping[str, Any]) -> None:
    """Makes a transformers tokenizer of `file` produce SentencePiece's ids, including spaces.

    Keeps its special tokens and post-processor, and whether a space stands before texts, if the settings say so.

    Args:
      hf: the transformers tokenizer; modified.
      file: the SentencePiece model.
      settings: tokenizer_config.json.

    Raises:
      CheckpointError: the file is not a SentencePiece model, or one that the tokenizers library can't express.
    """
    proto = _read(file)
    _refuse_unreadable(proto, file)
    backend = hf.backend_tokenizer
    state = json.loads(backend.to_str())
    spec = proto.normalizer_spec
    prefix = _prefix(spec, settings)
    model = pieces.model(proto)
    steps = [*_space_before(prefix), *pieces.splits(proto, model, type(backend))]
    state |= {"model": model, "normalizer": _normalizer(proto, prefix), "decoder": _decoder(spec, prefix)}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if steps else None
    symbols = pieces.of_type(proto, pieces.USER_DEFINED)
    added = state["added_tokens"]
    state["added_tokens"] = [each for each in added if each["special"] or each["content"] not in symbols]
    special = {each["content"] for each in state["added_tokens"]}
    hf._extra_special_tokens = [each for each in hf._extra_special_tokens if str(each) in special]
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
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto, data = schema.ModelProto(), file.read_bytes()  # pyrefly: ignore[missing-attribute]
    try:
        proto.ParseFromString(data)
        sentencepiece.SentencePieceProcessor(model_proto=data)
    except (DecodeError, RuntimeError) as error:
        hint = "download the file again"
        raise CheckpointError("not a SentencePiece model", where=file, got=str(error), hint=hint) from error
    return proto


def _refuse_unreadable(proto: Any, file: Path) -> None:
    """Raises `CheckpointError` for a kind of model of which the tokenizers library would make other ids or texts."""
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    unused = pieces.unused_by_merging(proto)
    changed = _changed_symbol(proto)
    reasons = {
        "model_type word": spec.model_type == pieces.WORD,
        "treat_whitespace_as_suffix true": spec.treat_whitespace_as_suffix,
        "escape_whitespaces false": not normalizer.escape_whitespaces,
        "a denormalizer": bool(proto.denormalizer_spec.precompiled_charsmap),
        "names of bytes whose characters are only in longer pieces": pieces.hides_bytes(proto),
        f"the piece {unused!r} of type UNUSED": unused is not None,
        f"the user-defined symbol {changed!r}, which its normalizer changes": changed is not None,
    }
    got = next((name for name, found in reasons.items() if found), None)
    if got is not None:
        raise CheckpointError(
            "a kind of SentencePiece model that can't be read exactly",
            where=file,
            got=got,
            expected="BPE, Unigram or char, with ▁ before words",
            hint=_HINT,
        )


def _changed_symbol(proto: Any) -> str | None:
    """A user-defined symbol that texts keep in SentencePiece, but not through `_normalizer`."""
    spec = proto.normalizer_spec
    charsmap = _charsmap(proto)
    for symbol in pieces.of_type(proto, pieces.USER_DEFINED):
        if spec.remove_extra_whitespaces and " " in symbol:
            return symbol
        if charsmap and any(charsmap.text_of(each) != each for each in symbol):
            return symbol
    return None


def _charsmap(proto: Any) -> Charsmap | None:
    """What characters become; user-defined symbols of one character stay."""
    if not proto.normalizer_spec.precompiled_charsmap:
        return None
    kept = [each for each in pieces.of_type(proto, pieces.USER_DEFINED) if len(each) == 1]
    return Charsmap(proto.normalizer_spec.precompiled_charsmap, keep=kept)


def _prefix(spec: Any, settings: Mapping[str, Any]) -> str:
    """Before which texts a space belongs: "never"; only the "first"; "always", after special tokens too.

    The settings go before the model, as in transformers.
    """
    said = settings.get("add_prefix_space")
    if not (spec.add_dummy_prefix if said is None else said):
        return "never"
    return "always" if settings.get("legacy") else "first"


def _normalizer(proto: Any, prefix: str) -> dict[str, Any]:
    """Leaves a space at the beginning of a text that has one if spaces are trimmed, as `_space_before` looks for it."""
    spec = proto.normalizer_spec
    steps: list[dict[str, Any]] = []
    charsmap = _charsmap(proto)
    if charsmap is not None:
        # `Precompiled` takes a line's end for one character and would drop its second half
        end, space = {"Regex": r"\r(?=\n)"}, charsmap.text_of("\r")
        steps.append({"type": "Replace", "pattern": end, "content": space})
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap.encoded()})
    if spec.remove_extra_whitespaces:
        start = "" if prefix == "never" else " "
        steps.append({"type": "Replace", "pattern": {"Regex": rf"[ {_SPACE}]+\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +"}, "content": start})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prefix == "never" or not spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _space_before(prefix: str) -> list[dict[str, Any]]:
    """Puts a space before the first text, even before one that begins with a space, unless such spaces are trimmed.

    `Metaspace` adds none to a text that begins with its own symbol, so the first step uses another symbol. Texts after
    special tokens, where SentencePiece has no rule, get a space from the second step if they have none.
    """
    if prefix == "never":
        return []
    common = {"type": "Metaspace", "split": False}
    before = {**common, "replacement": " ", "prepend_scheme": "first"}
    after = {**common, "replacement": _SPACE, "prepend_scheme": "always" if prefix == "always" else "never"}
    return [before, after]


def _decoder(spec: Any, prefix: str) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    steps: list[dict[str, Any]] = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix != "never" or spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
