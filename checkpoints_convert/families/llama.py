"""LLaMA and its kin: RMS norms, gated MLP, rotary embedding. One table of rules; the configs differ by values."""

import re
from typing import Any

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.rules import HEAD, HEAD_TARGET, TABLE_TARGET, Family, rules
from polarjax.configs import ModelConfig

BODY = "model."
LAYER = BODY + "layers.{i}."


def read_llama(reader: ConfigReader) -> ModelConfig:
    """LLaMA-2, LLaMA-3.x and the ReLU-fied LLaMAs."""
    biases = reader.flag("attention_bias", False)
    mlp_bias = reader.flag("mlp_bias", False)
    return _common(reader, max_positions=2048, qkv_bias=biases, out_bias=biases, mlp_bias=mlp_bias)


def _common(
    reader: ConfigReader,
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    **fields: Any,
) -> ModelConfig:
    """What the kin share; the arguments are the defaults of keys that are absent, and the fields that differ."""
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    head_dim = reader.optional_size("head_dim", head_dim)
    if head_dim is None and width % heads:
        mend = "correct config.json"
        raise reader.refuse(
            "hidden_size", "the heads do not divide it", width, f"a multiple of {heads}", mend
        )
    max_positions = reader.size("max_position_embeddings", max_positions)
    return ModelConfig(
        vocab_size=reader.size("vocab_size"),
        num_layers=reader.size("num_hidden_layers"),
        d_model=width,
        d_ff=reader.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=reader.size("num_key_value_heads", kv_heads or heads),
        head_dim=head_dim or width // heads,
        max_positions=max_positions,
        norm="rms",
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        activation=reader.activation("hidden_act", "silu"),
        gated_mlp=True,
        positions="rope",
        rope=reader.rope(max_positions),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        **fields,
    )


_MODEL = f"""
    {BODY}embed_tokens.weight         {TABLE_TARGET}      V E -> V E
    {BODY}norm.weight                 final_norm.scale    D -> D
    {HEAD}                            {HEAD_TARGET}       V E -> V E
"""
_LAYER = """
    self_attn.q_proj.weight           attn.wq             (K G H) D -> D K G H
    self_attn.k_proj.weight           attn.wk             (K H) D -> D K H
    self_attn.v_proj.weight           attn.wv             (K H) D -> D K H
    self_attn.o_proj.weight           attn.wo             D (K G H) -> K G H D
    self_attn.q_proj.bias             attn.bq             (K G H) -> K G H
    self_attn.k_proj.bias             attn.bk             (K H) -> K H
    self_attn.v_proj.bias             attn.bv             (K H) -> K H
    self_attn.o_proj.bias             attn.bo             D -> D
    self_attn.q_norm.weight           attn.q_norm.scale   H -> H
    self_attn.k_norm.weight           attn.k_norm.scale   H -> H
    input_layernorm.weight            attn_norm.scale     D -> D
    post_attention_layernorm.weight   mlp_norm.scale      D -> D
    mlp.gate_proj.weight              mlp.w_gate          F D -> F D
    mlp.gate_proj.bias                mlp.b_gate          F -> F
    mlp.up_proj.weight                mlp.w_up            F D -> F D
    mlp.up_proj.bias                  mlp.b_up            F -> F
    mlp.down_proj.weight              mlp.w_down          D F -> F D
    mlp.down_proj.bias                mlp.b_down          D -> D
"""
_RULES = rules(_MODEL) + rules(_LAYER, source=LAYER, target="layers.{i}.")


def _family(model_type: str, read_config: Any) -> Family:
    return Family(
        model_type=model_type,
        read_config=read_config,
        rules=_RULES,
        prefixes=tuple((name, BODY + name) for name in ("layers.", "embed_tokens.", "norm.")),
        buffers=re.compile(r"(^|\.)rotary_emb\.inv_freq$"),
    )


LLAMA = _family("llama", read_llama)
