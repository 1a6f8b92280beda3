"""Copies a HuggingFace folder's tokenizer and fixes what its files omit and transformers then gets wrong.

OPT and LLaMA start every text with a BOS token. If tokenizer_config.json doesn't say so, transformers silently omits it
(and reads a bare tokenizer.model without its leading space); see `repair`.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polarjax.errors import CheckpointError
from polarjax.generation.settings import GENERATION_CONFIG, KNOWN, GenerationSettings
from polarjax.storage.atomic import read_json, write_json
from polarjax.text.tokenizer import (
    SETTINGS,
    Tokenizer,
    can_read_sentencepiece,
    has_tokenizer,
    only_sentencepiece,
)

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG,
)
IDS = {
    "opt": {"bos_token": 2, "eos_token": 2, "pad_token": 1},
    "llama": {"bos_token": 1},
    "sparsellama": {"bos_token": 1},
    "mistral": {"bos_token": 1},
    "ministral": {"bos_token": 1},
}
"""Families that begin a text with BOS, and their special token ids, unless config.json gives others."""

_LLAMA_BOS = ("<s>", "<|begin_of_text|>")
_BOS_NAMES = {
    "opt": ("</s>",),
    "llama": _LLAMA_BOS,
    "sparsellama": _LLAMA_BOS,
    "mistral": _LLAMA_BOS,
    "ministral": _LLAMA_BOS,
}  # other models of a family don't use BOS
_SENTENCEPIECE = {0: "<unk>", 1: "<s>", 2: "</s>"}
_AGAIN = "download the file again"


def copy_tokenizer(
    source: Path, target: Path, *, model_type: str, config: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copies the tokenizer and generation settings of a HuggingFace folder, checks them and fixes the copy.

    Args:
      source: the HuggingFace folder; it is not changed.
      target: an existing, empty folder.
      model_type: the family.
      config: the source's config.json.

    Returns:
      the names of the copied files, and notes, one line each.

    Raises:
      CheckpointError: the tokenizer or generation_config.json is damaged, or has invalid values.
    """
    names = tuple(name for name in FILES if (source / name).is_file())
    for name in names:
        shutil.copyfile(source / name, target / name)
    try:
        notes = repair(target, model_type, config)
        settings = GenerationSettings.read(target)
    except CheckpointError as error:
        raise _about_the_source(error, source, target) from error
    return names, notes + settings.notes


def _about_the_source(error: CheckpointError, source: Path, target: Path) -> CheckpointError:
    """The same error with the file of `source` that is at fault, which may be config.json."""
    where, hint = Path(str(error.where).replace(str(target), str(source))), error.hint
    if where.name == GENERATION_CONFIG and not where.is_file():
        where, hint = where.with_name("config.json"), "correct the value or leave it out"
    return CheckpointError(error.what, where=where, got=error.got, expected=error.expected, hint=hint)


def repair(folder: Path, model_type: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Checks the tokenizer files in `folder`, completes them from the family and config.json, and returns what it did.

    Raises:
      CheckpointError: the tokenizer cannot be read.
    """
    if not (folder / GENERATION_CONFIG).is_file() and config.get("eos_token_id") is not None:
        write_json(folder / GENERATION_CONFIG, {key: config[key] for key in KNOWN if key in config})
    if not has_tokenizer(folder):
        return ()
    settings = _without_null(_read(folder / SETTINGS), "add_bos_token")
    if not isinstance(settings.get("add_bos_token", False), bool):
        got = repr(settings["add_bos_token"])
        raise CheckpointError(
            "add_bos_token is neither true nor false",
            where=folder / SETTINGS,
            got=got,
            expected="true, false or null",
            hint="write true or false, without quotes",
        )
    notes = (
        [f"{SETTINGS} asks for its own code (auto_map), which is never run"] if "auto_map" in settings else []
    )
    bare = only_sentencepiece(folder)
    added = _missing(folder, settings, model_type, config, bare=bare)
    if added:
        write_json(folder / SETTINGS, settings | added)
    if bare and not can_read_sentencepiece():
        notes.append(
            "tokenizer.model can be read only with polarjax[sentencepiece]; the text verbs will ask for it"
        )
        return (*notes, *_fixes(model_type, added, None))
    tokenizer = Tokenizer.load(folder, model_type=None if bare else model_type)
    bos = _wanted_bos(tokenizer, settings, model_type, bare=bare)
    if bos is not None:
        tokenizer.hf.add_bos_token = True
    if bare or bos is not None:
        tokenizer.hf.save_pretrained(folder)
    if bare:  # transformers would rebuild LLaMA's class from only the merges of tokenizer.json
        write_json(
            folder / SETTINGS, _read(folder / SETTINGS) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        )
    notes += _fixes(model_type, added, bos)
    size = config.get("vocab_size")
    if isinstance(size, int) and tokenizer.vocab_size > size:
        notes.append(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {size}: text with ids beyond is refused"
        )
    return tuple(notes)


def _missing(
    folder: Path, settings: Mapping[str, Any], model_type: str, config: Mapping[str, Any], *, bare: bool
) -> dict[str, Any]:
    """Entries to add to tokenizer_config.json: the class, and special tokens by config.json's ids."""
    added: dict[str, Any] = {}
    said = settings.keys() | _read(folder / "special_tokens_map.json").keys()
    if bare and model_type in ("llama", "sparsellama", "mistral", "ministral"):
        meant = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
        added = {key: value for key, value in meant.items() if key not in settings}
    elif "tokenizer_class" not in settings and isinstance(config.get("tokenizer_class"), str):
        added["tokenizer_class"] = config["tokenizer_class"]
    names = _SENTENCEPIECE if bare else _names_by_id(folder)
    kinds = ("eos_token", "pad_token", *(["bos_token"] if model_type in IDS else []))
    given = {kind: config.get(f"{kind}_id") for kind in kinds}
    ids = IDS.get(model_type, {}) | {kind: each for kind, each in given.items() if each is not None}
    if model_type == "opt" and str(settings.get("tokenizer_class", "GPT2")).startswith("GPT2"):
        ids["unk_token"] = ids["bos_token"]  # the class would add its own token
    for key, value in ids.items():
        value = value[0] if isinstance(value, list) and value else value
        name = names.get(value) if isinstance(value, int) else None
        strange = key == "bos_token" and name not in _BOS_NAMES[model_type]
        if key not in said and name is not None and not strange:
            added[key] = name
    return added


def _wanted_bos(
    tokenizer: Tokenizer, settings: Mapping[str, Any], model_type: str, *, bare: bool
) -> str | None:
    """The BOS token that texts should begin with but don't; None if nothing is wrong."""
    said, named = settings.get("add_bos_token"), settings.get("tokenizer_class")
    name, bos = tokenizer.hf.bos_token, tokenizer.bos_id
    if model_type not in IDS or said is False or bos is None:
        return None
    usual = bare or named is None or (model_type == "opt" and str(named).startswith("GPT2"))
    if said is None and not (usual and name in _BOS_NAMES[model_type]):
        return None
    return name if tokenizer.hf.encode("a")[:1] != [bos] else None


def _fixes(model_type: str, added: Mapping[str, Any], bos: str | None) -> list[str]:
    parts = [f"{key} {value}" for key, value in added.items()]
    if bos is not None:
        parts.append(f"texts begin with {bos}")
    return (
        [f"tokenizer fixed for {model_type}, because {SETTINGS} does not say: {', '.join(parts)}"]
        if parts
        else []
    )


def _names_by_id(folder: Path) -> dict[int, str]:
    file = next(each for each in (folder / "tokenizer.json", folder / "vocab.json") if each.is_file())
    data = read_json(file, hint=_AGAIN)
    if file.name == "vocab.json":
        return _inverted(data)
    model, extra = data.get("model"), data.get("added_tokens")
    names = _inverted(model.get("vocab") if isinstance(model, dict) else None)
    tokens = [each for each in extra if isinstance(each, dict)] if isinstance(extra, list) else []
    pairs = [(each.get("content"), each.get("id")) for each in tokens]
    return names | {index: name for name, index in pairs if isinstance(name, str) and isinstance(index, int)}


def _inverted(vocabulary: Any) -> dict[int, str]:
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return {index: name for name, index in pairs if isinstance(index, int)}


def _without_null(data: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name or value is not None}


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, hint=_AGAIN) if file.is_file() else {}
