"""Trains the bundled models' byte-level BPE and writes it as a HuggingFace tokenizer folder."""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bench.reference_models import corpus

VOCAB_SIZE = 4096
PAD, BOS = "<|pad|>", "<|endoftext|>"  # ids 0 and 1; BOS starts and ends a document
NOVEL_CHARACTERS = 18_000_000
CODE_CHARACTERS = 8_000_000


def train(novels: list[str], code: list[str]) -> Tokenizer:
    """A byte-level BPE without an unknown token: every text round-trips exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(PAD, special=True), AddedToken(BOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = _sample(novels, NOVEL_CHARACTERS) + _sample(code, CODE_CHARACTERS)
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, corpus.BOS_ID)]
    )
    return tokenizer


def _sample(documents: list[str], characters: int) -> list[str]:
    """The same share of every document, from its start."""
    share = min(1.0, characters / sum(map(len, documents)))
    return [text[: round(share * len(text))] for text in documents]


def save(tokenizer: Tokenizer, folder: Path, max_positions: int) -> None:
    """Writes `tokenizer.json`, and a `tokenizer_config.json` with which AutoTokenizer uses it unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--novels", type=Path, required=True, help="training text, form feeds between documents"
    )
    parser.add_argument("--out", type=Path, required=True, help="tokenizer folder to write")
    parser.add_argument("--max-positions", type=int, default=512)
    args = parser.parse_args()
    tokenizer = train(corpus.novels(args.novels), corpus.code())
    save(tokenizer, args.out, args.max_positions)
    print(f"{tokenizer.get_vocab_size()} tokens -> {args.out}")


if __name__ == "__main__":
    main()
