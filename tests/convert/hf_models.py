"""Tiny HuggingFace models in torch, random in every parameter, and their folders."""

from pathlib import Path

import torch
import transformers

torch.set_num_threads(1)  # these models are too small to share out

VOCAB = 61
POSITIONS = 96
_COMMON = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
_OPT = {**_COMMON, "ffn_dim": 40, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 24}
_LLAMA = {**_COMMON, "intermediate_size": 40, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 12,
}
_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

MODELS: dict[str, tuple[str, dict]] = {
    "opt": ("OPT", _OPT),
    "opt-untied": ("OPT", {**_OPT, "tie_word_embeddings": False}),
    "opt-no-bias": ("OPT", {**_OPT, "enable_bias": False}),
    "opt-350m": ("OPT", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama-mha": ("Llama", _LLAMA),
    "llama-gqa": ("Llama", {**_LLAMA, "num_key_value_heads": 2}),
    "llama-mqa": ("Llama", {**_LLAMA, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-gqa-tied": ("Llama", {**_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama3": ("Llama", {**_LLAMA, "num_key_value_heads": 2, "rope_parameters": _LLAMA3}),
    "llama-relu": ("Llama", {**_LLAMA, "num_key_value_heads": 2, "hidden_act": "relu", "head_dim": 10}),
    "llama-linear-rope": (
        "Llama",
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    ),
    "mistral": ("Mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 7}),
    "mistral-no-window": ("Mistral", {**_LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
    "mistral-mqa-tied": (
        "Mistral",
        {**_LLAMA, "num_key_value_heads": 1, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2", {**_LLAMA, "num_key_value_heads": 2}),
    "qwen2-mha-tied": ("Qwen2", {**_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {**_LLAMA, "num_key_value_heads": 2, **_WINDOW}),
    "qwen3": ("Qwen3", {**_LLAMA, "num_key_value_heads": 2, "head_dim": 10}),
    "qwen3-mqa-tied": (
        "Qwen3",
        {**_LLAMA, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "qwen3-mha-window": (
        "Qwen3",
        {**_LLAMA, "num_key_value_heads": 4, "head_dim": 6, "attention_bias": True, **_WINDOW},
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """The model called `name`, with attention computed plainly."""
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**fields, attn_implementation="eager", pad_token_id=0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = 2 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + centre)
    return model.to(dtype).eval()


def save(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shards: bool = False
) -> torch.nn.Module:
    """Writes the model called `name` as a HuggingFace folder, in one file or in many shards."""
    model = make(name, dtype)
    model.save_pretrained(folder, max_shard_size="8KB" if shards else "1GB")
    return model
