"""OPT: learned positions starting at row 2, layer norms with biases, ReLU, a tied head."""

import re
from typing import Any

from checkpoints_convert.config_reader import ConfigReader
from checkpoints_convert.rules import HEAD_TARGET, TABLE_TARGET, Family, rules
from checkpoints_convert.tensor_names import HEAD
from polarjax.configs import ModelConfig

BODY = "model.decoder."
LAYER = BODY + "layers.{i}."


def read_config(reader: ConfigReader) -> ModelConfig:
    """The configuration of a checkpoint with model_type "opt". OPT-350m is post-norm, with projections."""
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    if width % heads:
        hint = "correct config.json"
        raise reader.refuse(
            "hidden_size", "not divisible by the number of heads", width, f"a multiple of {heads}", hint
        )
    reader.only("layer_norm_elementwise_affine", True, "use a model whose norms have weights")
    embed_dim = reader.size("word_embed_proj_dim", width)
    biases = reader.flag("enable_bias", True)
    pre_norm = reader.flag("do_layer_norm_before", True)
    final_norm = not reader.flag("_remove_final_layer_norm", False)
    return ModelConfig(
        vocab_size=reader.size("vocab_size"),
        num_layers=reader.size("num_hidden_layers"),
        d_model=width,
        d_ff=reader.size("ffn_dim"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_positions=reader.size("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=1e-5,
        norm_bias=True,
        norm_position="pre" if pre_norm else "post",
        final_norm=pre_norm and final_norm,
        activation=reader.activation("activation_function", "relu"),
        gated_mlp=False,
        mlp_bias=biases,
        qkv_bias=biases,
        out_bias=biases,
        positions="learned",
        position_offset=2,
        embed_dim=None if embed_dim == width else embed_dim,
        tie_embeddings=reader.flag("tie_word_embeddings", True),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The keys from which `read_config` makes `config`, if OPT can express it."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "ffn_dim": config.d_ff,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "word_embed_proj_dim": config.embed_dim or config.d_model,
        "enable_bias": config.qkv_bias,
        "do_layer_norm_before": config.norm_position == "pre",
        "_remove_final_layer_norm": config.norm_position == "pre" and not config.final_norm,
        "activation_function": config.activation,
        "tie_word_embeddings": config.tie_embeddings,
    }


_MODEL = f"""
    {BODY}embed_tokens.weight         {TABLE_TARGET}      V E -> V E
    {BODY}embed_positions.weight      embed.positions     P D -> P D
    {BODY}project_in.weight           embed.project_in    D E -> E D
    {BODY}project_out.weight          embed.project_out   E D -> D E
    {BODY}final_layer_norm.weight     final_norm.scale    D -> D
    {BODY}final_layer_norm.bias       final_norm.bias     D -> D
    {HEAD}                            {HEAD_TARGET}       V E -> V E
"""
_LAYER = """
    self_attn.q_proj.weight           attn.wq             (K G H) D -> D K G H
    self_attn.k_proj.weight           attn.wk             (K H) D -> D K H
    self_attn.v_proj.weight           attn.wv             (K H) D -> D K H
    self_attn.out_proj.weight         attn.wo             D (K G H) -> K G H D
    self_attn.q_proj.bias             attn.bq             (K G H) -> K G H
    self_attn.k_proj.bias             attn.bk             (K H) -> K H
    self_attn.v_proj.bias             attn.bv             (K H) -> K H
    self_attn.out_proj.bias           attn.bo             D -> D
    self_attn_layer_norm.weight       attn_norm.scale     D -> D
    self_attn_layer_norm.bias         attn_norm.bias      D -> D
    final_layer_norm.weight           mlp_norm.scale      D -> D
    final_layer_norm.bias             mlp_norm.bias       D -> D
    fc1.weight                        mlp.w_up            F D -> F D
    fc1.bias                          mlp.b_up            F -> F
    fc2.weight                        mlp.w_down          D F -> F D
    fc2.bias                          mlp.b_down          D -> D
"""

OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    covers="OPT, 125m to 66b, with 350m's projections and norms",
    read_config=read_config,
    write_config=write_config,
    rules=rules(_MODEL) + rules(_LAYER, source=LAYER, target="layers.{i}."),
    prefixes=(("decoder.", BODY),),
    buffers=re.compile(r"(^|\.)decoder\.version$"),
)
