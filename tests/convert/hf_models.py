"""Tiny HuggingFace models in torch, random in every parameter, and their folders."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

torch.set_num_threads(1)  # these models are too small to share out


class SparseLlamaConfig(transformers.LlamaConfig):
    """config.json of the published ProSparse models: `hidden_act_param` is the threshold of `hidden_act` "fatrelu"."""

    model_type = "sparsellama"


class FatRelu(torch.nn.Module):
    """A value passes where it is not below the threshold, as in the code that came with those models."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ge(x, self.threshold)


class SparseLlamaForCausalLM(transformers.LlamaForCausalLM):
    """Transformers' LLaMA with that activation, which transformers does not have."""

    config_class = SparseLlamaConfig

    def __init__(self, config: SparseLlamaConfig):
        known = copy.copy(config)
        known.hidden_act = "relu"
        super().__init__(known)
        self.config = config
        for layer in self.model.layers:
            layer.mlp.act_fn = FatRelu(config.hidden_act_param)


transformers.AutoConfig.register("sparsellama", SparseLlamaConfig)
transformers.AutoModelForCausalLM.register(SparseLlamaConfig, SparseLlamaForCausalLM)

VOCAB = 61
POSITIONS = 96
_COMMON = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT = {**_COMMON, "ffn_dim": 40, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 24}
_OPT_350M = {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
_LLAMA = {**_COMMON, "intermediate_size": 40, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 12,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
_GQA, _THREE_LAYERS = {"num_key_value_heads": 2}, {"num_hidden_layers": 3}

_FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", _LLAMA),
    "llama3": ("Llama", {**_LLAMA, "rope_parameters": _LLAMA3}),
    "llama-relu": ("Llama", {**_LLAMA, "hidden_act": "relu", "head_dim": 10}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 7}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 10}),
}
_KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
_HEADS = {"": False, "-tied": True}

MATRIX: dict[str, tuple[str, dict]] = {
    f"{family}-{kind}{suffix}": (
        name,
        fields
        | {"num_key_value_heads": heads, "tie_word_embeddings": tied}
        | {"num_hidden_layers": 2 if (kind, tied) == ("gqa", False) else 1},
    )
    for family, (name, fields) in _FAMILIES.items()
    for kind, heads in _KV_HEADS.items()
    for suffix, tied in _HEADS.items()
}
"""Every family with grouped queries, times every grouping, times tied and untied heads; one of each has two layers."""

MODELS: dict[str, tuple[str, dict]] = MATRIX | {
    "opt": ("OPT", {**_OPT, **_THREE_LAYERS}),
    "opt-untied": ("OPT", {**_OPT, "tie_word_embeddings": False}),
    "opt-no-bias": ("OPT", {**_OPT, "enable_bias": False}),
    "opt-no-final-norm": ("OPT", {**_OPT, "_remove_final_layer_norm": True}),
    "opt-350m": ("OPT", _OPT_350M),
    "opt-350m-untied": ("OPT", {**_OPT_350M, "tie_word_embeddings": False}),
    "prosparse": ("SparseLlama", {**_LLAMA, **_GQA, "hidden_act": "fatrelu", "hidden_act_param": 0.5}),
    "prosparse-tied": (
        "SparseLlama",
        {**_LLAMA, "hidden_act": "fatrelu", "hidden_act_param": 0.5, "tie_word_embeddings": True},
    ),
    "llama-gqa": ("Llama", {**_LLAMA, **_GQA, **_THREE_LAYERS}),
    "llama-biases": ("Llama", {**_LLAMA, **_GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-relu-biases": ("Llama", {**_LLAMA, **_GQA, "hidden_act": "relu", "mlp_bias": True}),
    "llama-linear-rope": ("Llama", {**_LLAMA, "rope_parameters": _LINEAR}),
    "mistral-no-window": ("Mistral", {**_LLAMA, **_GQA, "sliding_window": None}),
    "ministral-window": (
        "Ministral",
        {
            **_LLAMA,
            **_GQA,
            "head_dim": 6,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen2-window": ("Qwen2", {**_LLAMA, **_GQA, **_WINDOW}),
    "qwen3-window": ("Qwen3", {**_LLAMA, **_GQA, "head_dim": 6, "attention_bias": True, **_WINDOW}),
}


def named(name: str) -> Any:
    """A class of transformers, or of this file."""
    return getattr(transformers, name, None) or globals()[name]


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """The model called `name`, with attention computed plainly."""
    family, fields = MODELS[name]
    config = named(f"{family}Config")(**fields, attn_implementation="eager", pad_token_id=0)
    model = named(f"{family}ForCausalLM")(config)
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
