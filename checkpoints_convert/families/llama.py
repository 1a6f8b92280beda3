"""LLaMA and related families: RMS norms, gated MLP, rotary embedding. They share one table of rules."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from checkpoints_convert.config_reader import FATRELU, Activation, ConfigReader
from checkpoints_convert.rules import HEAD_TARGET, TABLE_TARGET, Family, rules
from checkpoints_convert.tensor_names import HEAD
from polarjax.configs import ModelConfig, RopeConfig

BODY = "model."
LAYER = BODY + "layers.{i}."


def read_llama(reader: ConfigReader) -> ModelConfig:
    """LLaMA-2, LLaMA-3.x and the ReLU-fied LLaMAs."""
    return _llama(reader)


def read_sparsellama(reader: ConfigReader) -> ModelConfig:
    """ProSparse: LLaMA with a thresholded ReLU, `hidden_act` "fatrelu", whose threshold is `hidden_act_param`.

    Other activations ignore the parameter, as in ProSparse's own code.
    """
    if reader.get("hidden_act", "silu", str, "a name") == FATRELU:
        threshold = reader.threshold("hidden_act_param")
        return _llama(reader, activation="relu", activation_threshold=threshold)
    reader.ignore("hidden_act_param")
    return _llama(reader)


def _llama(reader: ConfigReader, **fields: Any) -> ModelConfig:
    biases = reader.flag("attention_bias", False)
    mlp_bias = reader.flag("mlp_bias", False)
    return _common(reader, max_positions=2048, qkv_bias=biases, out_bias=biases, mlp_bias=mlp_bias, **fields)


def read_mistral(reader: ConfigReader) -> ModelConfig:
    """Mistral: the same sliding window in every layer, or none (null)."""
    window = reader.optional_size("sliding_window", None if reader.has("sliding_window") else 4096)
    kv_heads = None if reader.has("num_key_value_heads") else 8
    return _common(reader, max_positions=131072, kv_heads=kv_heads, sliding_window=window)


def read_ministral(reader: ConfigReader) -> ModelConfig:
    """Ministral: Mistral with `layer_types`, which says which layers have the window; without it, all do."""
    config = read_mistral(reader)
    kinds, window = reader.layer_types(), config.sliding_window
    if kinds is None:
        return config
    hint = "set sliding_window, or list only full_attention"
    return dataclasses.replace(config, sliding_window=_listed(reader, kinds, cast(int | None, window), hint))


def read_qwen2(reader: ConfigReader) -> ModelConfig:
    """Qwen2 and Qwen2.5: biases on queries, keys and values."""
    return _common(reader, max_positions=32768, qkv_bias=True, sliding_window=_layer_windows(reader))


def read_qwen3(reader: ConfigReader) -> ModelConfig:
    """Qwen3: norms of queries and keys, and its own head width."""
    biases = reader.flag("attention_bias", False)
    return _common(
        reader,
        max_positions=32768,
        head_dim=128,
        qkv_bias=biases,
        out_bias=biases,
        qk_norm=True,
        sliding_window=_layer_windows(reader),
    )


def _layer_windows(reader: ConfigReader) -> int | tuple[int | None, ...] | None:
    """Qwen's window: enabled by `use_sliding_window`, in layers from `max_window_layers` on or as listed."""
    used = reader.flag("use_sliding_window", False)
    first = reader.count("max_window_layers", 28)
    window = reader.optional_size("sliding_window", None if reader.has("sliding_window") else 4096)
    layers = reader.size("num_hidden_layers")
    kinds = reader.layer_types() or [
        "sliding_attention" if used and window is not None and i >= first else "full_attention"
        for i in range(layers)
    ]
    hint = "set use_sliding_window and sliding_window, or remove layer_types"
    return _listed(reader, kinds, window if used else None, hint)


def _listed(
    reader: ConfigReader, kinds: Sequence[str], window: int | None, hint: str
) -> int | tuple[int | None, ...] | None:
    """The window of the layers of kind `sliding_attention`; raises if there are such layers but no window."""
    slides = [kind == "sliding_attention" for kind in kinds]
    if any(slides) and window is None:
        raise reader.refuse("layer_types", "a sliding layer without a window", kinds, None, hint)
    if all(slides) or not any(slides):
        return window if any(slides) else None
    return tuple(window if each else None for each in slides)


def _common(
    reader: ConfigReader,
    *,
    max_positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    activation: Activation | None = None,
    **fields: Any,
) -> ModelConfig:
    """The shared part of the config; arguments are defaults of absent keys, and family-specific fields."""
    width, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    head_dim = reader.optional_size("head_dim", head_dim)
    if head_dim is None and width % heads:
        hint = "correct config.json"
        raise reader.refuse(
            "hidden_size", "not divisible by the number of heads", width, f"a multiple of {heads}", hint
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
        activation=activation or reader.activation("hidden_act", "silu"),
        gated_mlp=True,
        positions="rope",
        rope=reader.rope(max_positions),
        tie_embeddings=reader.flag("tie_word_embeddings", False),
        **fields,
    )


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """The keys from which `read_llama` makes `config`."""
    return {**_write_common(config), "attention_bias": config.out_bias, "mlp_bias": config.mlp_bias}


def write_sparsellama(config: ModelConfig) -> dict[str, Any]:
    """The keys from which `read_sparsellama` makes `config`, if ProSparse can express it."""
    keys = write_llama(config)
    if config.activation_threshold:
        keys |= {"hidden_act": FATRELU, "hidden_act_param": config.activation_threshold}
    return keys


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """The keys from which `read_mistral` makes `config`, if Mistral can express it."""
    return {**_write_common(config), "sliding_window": config.sliding_window}


def write_ministral(config: ModelConfig) -> dict[str, Any]:
    """The keys from which `read_ministral` makes `config`, if Ministral can express it. Its class needs a window."""
    keys = _write_windows(config)
    return {**_write_common(config), **keys, "sliding_window": keys["sliding_window"] or config.max_positions}


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    """The keys from which `read_qwen2` makes `config`, if Qwen2 can express it."""
    keys = _write_windows(config)
    slides = [kind == "sliding_attention" for kind in keys["layer_types"]]
    if not any(slides):
        return {**_write_common(config), "use_sliding_window": False, "sliding_window": None}
    return {
        **_write_common(config),
        **keys,
        "use_sliding_window": True,
        "max_window_layers": slides.index(True),
    }


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    windows = [config.window(layer) for layer in range(config.num_layers)]
    return {
        "sliding_window": next(filter(None, windows), None),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in windows],
    }


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """The keys from which `read_qwen3` makes `config`, if Qwen3 can express it."""
    return {**write_qwen2(config), "attention_bias": config.out_bias}


def _write_common(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tie_embeddings,
        **_write_rope(config.rope or RopeConfig()),
    }


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Uses the old keys, which every version of transformers reads."""
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return {"rope_theta": rope.theta, "rope_scaling": scaling if rope.scaling else None}


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


def _family(
    model_type: str, covers: str, *, architecture: str, read: Any, write: Any, own_code: bool = False
) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        covers=covers,
        read_config=read,
        write_config=write,
        rules=_RULES,
        prefixes=tuple((name, BODY + name) for name in ("layers.", "embed_tokens.", "norm.")),
        own_code=own_code,
    )


LLAMA = _family(
    "llama",
    "LLaMA 2, 3, 3.1, 3.2; ReLU-fied ones (ReLU-LLaMA)",
    architecture="LlamaForCausalLM",
    read=read_llama,
    write=write_llama,
)
MISTRAL = _family(
    "mistral", "Mistral 7B", architecture="MistralForCausalLM", read=read_mistral, write=write_mistral
)
MINISTRAL = _family(
    "ministral",
    "Ministral 8B; `mistral` with `layer_types`, as in transformers",
    architecture="MinistralForCausalLM",
    read=read_ministral,
    write=write_ministral,
)
QWEN2 = _family(
    "qwen2", "Qwen2, Qwen2.5", architecture="Qwen2ForCausalLM", read=read_qwen2, write=write_qwen2
)
QWEN3 = _family("qwen3", "Qwen3, dense", architecture="Qwen3ForCausalLM", read=read_qwen3, write=write_qwen3)
SPARSELLAMA = _family(
    "sparsellama",
    "ProSparse LLaMA-2",
    architecture="SparseLlamaForCausalLM",
    read=read_sparsellama,
    write=write_sparsellama,
    own_code=True,
)
