"""Held-out perplexity of a bundled model and of a unigram baseline, using transformers' own torch classes."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.reference_models import corpus
from polarjax.text.corpus import read_text, standard_library_text
from polarjax.text.token_windows import token_stream
from polarjax.text.token_windows import windows as cut

BATCH = 16


def unigram_log_probability(streams: list[np.ndarray], vocab: int, code_share: float = 0.3) -> np.ndarray:
    """Natural-log probability of each token [V] under the training mix, with one added to every count."""
    shares = (1 - code_share, code_share)
    counts = [np.bincount(stream, minlength=vocab) + 1.0 for stream in streams]
    mix = [share * count / count.sum() for share, count in zip(shares, counts, strict=True)]
    return np.log(np.sum(mix, axis=0))


def encode(tokenizer, text: str, bos: int) -> np.ndarray:
    """Documents as one stream, `bos` before each; special tokens in the text are not recognized as such."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return token_stream(text, lambda t: backend.encode(t, add_special_tokens=False).ids, separator=bos)


def windows(model, tokenizer, text: str) -> np.ndarray:
    """Non-overlapping rows [n T] over the model's whole context, each starting with BOS."""
    bos = tokenizer.bos_token_id
    return cut(encode(tokenizer, text, bos), model.config.max_position_embeddings, first=bos)


@torch.inference_mode()
def negative_log_likelihood(model, rows: np.ndarray) -> float:
    """Mean over all tokens of rows [n T] except each row's first, in nats; rows are scored independently."""
    total = 0.0
    for i in range(0, len(rows), BATCH):
        tokens = torch.from_numpy(rows[i : i + BATCH].astype(np.int64))
        logits = model(tokens[:, :-1]).logits.float()
        targets = tokens[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    return total / rows[:, 1:].size


@torch.inference_mode()
def neuron_density(model, rows: np.ndarray) -> list[float]:
    """Share of positive pre-activations in each layer of an OPT model, averaged over tokens and neurons."""
    shares: list[list[float]] = [[] for _ in model.model.decoder.layers]
    hooks = [
        layer.fc1.register_forward_hook(
            lambda _, __, pre, i=i: shares[i].append((pre > 0).float().mean().item())
        )
        for i, layer in enumerate(model.model.decoder.layers)
    ]
    for i in range(0, len(rows) - BATCH + 1, BATCH):
        model(torch.from_numpy(rows[i : i + BATCH].astype(np.int64)))
    for hook in hooks:
        hook.remove()
    return [float(np.mean(share)) for share in shares]


def report(model, tokenizer, unigram: np.ndarray, text: str) -> dict[str, float]:
    """Perplexities of windows of [BOS, T - 1 tokens]; bits per byte follow from the bytes per token."""
    rows = windows(model, tokenizer, text)
    bytes_per_token = len(text.encode()) / len(encode(tokenizer, text, tokenizer.bos_token_id))
    nll = negative_log_likelihood(model, rows)
    result = {
        "tokens": rows[:, 1:].size,
        "bytes_per_token": bytes_per_token,
        "perplexity": math.exp(nll),
        "unigram_perplexity": math.exp(-unigram[rows[:, 1:]].mean()),
        "bits_per_byte": nll / math.log(2) / bytes_per_token,
    }
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="HF folders")
    parser.add_argument("--tokens", type=Path, required=True, help="training token files, for the baseline")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="held-out text; may be repeated"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    args = parser.parse_args()
    texts = {path.name.split(".")[0]: read_text(path) for path in args.text}
    texts["standard library, evaluation split"] = standard_library_text("evaluation")
    streams = [corpus.read_stream(args.tokens / f"{name}.u16.xz") for name in corpus.TRAIN_FILES]
    lines = []
    for folder in args.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        unigram = unigram_log_probability(streams, model.config.vocab_size)
        for name, text in texts.items():
            line = {"model": folder.name, "text": name, **report(model, tokenizer, unigram, text)}
            if model.config.model_type == "opt":
                rows = windows(model, tokenizer, text)[:128]
                line["neuron_density"] = [round(density, 4) for density in neuron_density(model, rows)]
            print(json.dumps(line), flush=True)
            lines.append(line)
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
