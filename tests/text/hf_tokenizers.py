"""Small tokenizers in the shapes that HuggingFace folders have: OPT, LLaMA 2 (two ways), LLaMA 3."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from polarjax.text import tokenizer as text

CORPUS = ["Hello world, this is a test.", "def main(x): return x + 1", "the quick brown fox"] * 20
OPT_SETTINGS = {
    "errors": "replace",
    "unk_token": "</s>",
    "bos_token": "</s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "add_prefix_space": False,
    "add_bos_token": True,
}
LLAMA_SETTINGS = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 400},
    "llama": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 400},
}


def write_config(folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """config.json of a family; as far as tokenizers look at it."""
    config = CONFIGS[kind] | changes
    folder.joinpath("config.json").write_text(json.dumps(config))
    return config


def byte_level(specials: list[str], *, begin: str | None = None) -> Tokenizer:
    """A byte-level BPE, like those of OPT, LLaMA 3 and Qwen; `begin` stands before each text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    if begin is not None:
        token = (begin, specials.index(begin))
        made.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[token])
    return made


def byte_fallback(*, begin: bool = True) -> Tokenizer:
    """A BPE with byte fallback and ▁ for spaces, like tokenizer.json of LLaMA 2; `begin`: behind <s>."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=specials + data, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    state = json.loads(made.to_str())
    state["added_tokens"] = [each for each in state["added_tokens"] if each["content"] not in data]
    return Tokenizer.from_str(json.dumps(state))


def write_opt(folder: Path, settings: dict[str, Any] | None = None) -> Path:
    """vocab.json and merges.txt, as on the hub; `settings` None leaves tokenizer_config.json out."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level(["<s>", "<pad>", "</s>", "<unk>"]).model.save(str(folder))
    return _finished(folder, "opt", settings)


def write_llama(folder: Path, settings: dict[str, Any] | None = None, *, begin: bool = True) -> Path:
    """tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_fallback(begin=begin).save(str(folder / "tokenizer.json"))
    return _finished(folder, "llama", settings)


def write_sentencepiece(folder: Path, settings: dict[str, Any] | None = None) -> Path:
    """tokenizer.model alone."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("tokenizer.model").write_bytes(_sentencepiece())
    return _finished(folder, "llama", settings)


def write_json_tokenizer(folder: Path, kind: str, made: Tokenizer) -> Path:
    """tokenizer.json of any tokenizer, and config.json of a family."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return _finished(folder, kind, None)


@functools.cache
def of_letters(count: int) -> text.Tokenizer:
    """So many tokens, each a character: "!" and those after it in ASCII."""
    ids = {chr(33 + i): i for i in range(count)}
    made = Tokenizer(models.WordLevel(ids, unk_token="!"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    with tempfile.TemporaryDirectory() as folder:
        return text.Tokenizer.load(write_json_tokenizer(Path(folder), "llama", made))


def _finished(folder: Path, kind: str, settings: dict[str, Any] | None) -> Path:
    write_config(folder, kind)
    if settings is not None:
        folder.joinpath("tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@functools.cache
def _sentencepiece() -> bytes:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_prefix=f"{folder}/m",
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return Path(folder, "m.model").read_bytes()
