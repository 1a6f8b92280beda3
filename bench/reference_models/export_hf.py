"""Writes a decoder of the OPT or LLaMA architecture as a HuggingFace folder."""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from bench.reference_models.corpus import BOS_ID
from bench.reference_models.models import MODELS
from polarjax.configs import ModelConfig

PAD_ID = 0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def hf_tensors(config: ModelConfig, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """polarjax's parameters under their HF names and in their HF layouts (`[out in]` matrices)."""
    naming = _opt_layer if config.positions == "learned" else _llama_layer
    stem = "model.decoder." if config.positions == "learned" else "model."
    tensors = {f"{stem}embed_tokens.weight": flat["embed.tokens"]}
    if config.positions == "learned":
        tensors[f"{stem}embed_positions.weight"] = flat["embed.positions"]
        tensors |= _affine(f"{stem}final_layer_norm", "final_norm", flat)
    else:
        tensors[f"{stem}norm.weight"] = flat["final_norm.scale"]
    for i in range(config.num_layers):
        layer = naming(
            {n.removeprefix(f"layers.{i}."): v for n, v in flat.items() if n.startswith(f"layers.{i}.")}
        )
        tensors |= {f"{stem}layers.{i}.{name}": value for name, value in layer.items()}
    return tensors


def _affine(hf: str, ours: str, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{hf}.weight": flat[f"{ours}.scale"], f"{hf}.bias": flat[f"{ours}.bias"]}


def _attention(flat: Mapping[str, np.ndarray], out: str) -> dict[str, np.ndarray]:
    width = flat["attn.wq"].shape[0]
    tensors = {f"self_attn.{n}_proj.weight": flat[f"attn.w{n}"].reshape(width, -1).T for n in "qkv"}
    return tensors | {f"self_attn.{out}.weight": flat["attn.wo"].reshape(-1, width).T}


def _opt_layer(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        **_attention(flat, "out_proj"),
        **{f"self_attn.{n}_proj.bias": flat[f"attn.b{n}"].reshape(-1) for n in "qkv"},
        "self_attn.out_proj.bias": flat["attn.bo"],
        **_affine("self_attn_layer_norm", "attn_norm", flat),
        **_affine("final_layer_norm", "mlp_norm", flat),
        "fc1.weight": flat["mlp.w_up"],
        "fc1.bias": flat["mlp.b_up"],
        "fc2.weight": flat["mlp.w_down"].T,
        "fc2.bias": flat["mlp.b_down"],
    }


def _llama_layer(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        **_attention(flat, "o_proj"),
        "input_layernorm.weight": flat["attn_norm.scale"],
        "post_attention_layernorm.weight": flat["mlp_norm.scale"],
        "mlp.gate_proj.weight": flat["mlp.w_gate"],
        "mlp.up_proj.weight": flat["mlp.w_up"],
        "mlp.down_proj.weight": flat["mlp.w_down"].T,
    }


def hf_config(config: ModelConfig) -> dict[str, object]:
    """The `config.json` that transformers reads."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": BOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": "bfloat16",
        "use_cache": True,
    }
    if config.positions == "learned":
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            **common,
            "word_embed_proj_dim": config.d_model,
            "ffn_dim": config.d_ff,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "dropout": 0.0,
            "layerdrop": 0.0,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common,
        "intermediate_size": config.d_ff,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope.theta if config.rope else 10_000.0,
        },
        "attention_bias": False,
        "mlp_bias": False,
    }


def save_weights(path: Path, config: ModelConfig, flat: Mapping[str, np.ndarray]) -> None:
    """`model.safetensors` in bfloat16, replaced in one step."""
    cast = {n: np.ascontiguousarray(v, ml_dtypes.bfloat16) for n, v in hf_tensors(config, flat).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(cast, partial, metadata={"format": "pt"})
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Puts trained weights, tokenizer and configs into one HF folder."
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="model.safetensors written by train.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder written by tokenizer.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size = sum(value.size for value in load_file(args.weights).values())
    shutil.copyfile(args.weights, args.out / "model.safetensors")
    for name in TOKENIZER_FILES:
        shutil.copyfile(args.tokenizer / name, args.out / name)
    generation = {"bos_token_id": BOS_ID, "eos_token_id": BOS_ID, "pad_token_id": PAD_ID}
    for name, content in (("config", hf_config(MODELS[args.model])), ("generation_config", generation)):
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"{size} parameters, {(args.out / 'model.safetensors').stat().st_size} bytes -> {args.out}")


if __name__ == "__main__":
    main()
