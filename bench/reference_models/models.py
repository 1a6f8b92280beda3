"""Configurations of the bundled models, and tiny ones to try the scripts with."""

import dataclasses

from polarjax.configs import ModelConfig, RopeConfig

OPT_6M = ModelConfig(
    vocab_size=4096,
    num_layers=6,
    d_model=256,
    d_ff=1024,
    num_heads=8,
    num_kv_heads=8,
    head_dim=32,
    max_positions=512,
    norm="layer",
    norm_bias=True,
    activation="relu",
    gated_mlp=False,
    mlp_bias=True,
    qkv_bias=True,
    out_bias=True,
    positions="learned",
    position_offset=2,
    tie_embeddings=True,
)

LLAMA_6M = ModelConfig(
    vocab_size=4096,
    num_layers=6,
    d_model=256,
    d_ff=512,
    num_heads=16,
    num_kv_heads=8,
    head_dim=32,
    max_positions=512,
    norm="rms",
    activation="silu",
    positions="rope",
    rope=RopeConfig(theta=10_000.0),
    tie_embeddings=True,
)

_MICRO = {"num_layers": 2, "d_model": 64, "d_ff": 128, "head_dim": 16, "max_positions": 64}

MODELS = {
    "opt-6m": OPT_6M,
    "llama-6m": LLAMA_6M,
    "opt-micro": dataclasses.replace(OPT_6M, num_heads=4, num_kv_heads=4, **_MICRO),
    "llama-micro": dataclasses.replace(LLAMA_6M, num_heads=4, num_kv_heads=2, **_MICRO),
}
