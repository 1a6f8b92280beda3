"""The config.json of published models, as their folders hold them: read rightly, in both spellings, or refused."""

from typing import Any

import pytest

import polarjax as pj
from checkpoints_convert import config_from_hf
from polarjax import costs
from tests.one_line import refuses

_OPT = {
    "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
    "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True,
    "dropout": 0.1, "eos_token_id": 2, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
    "model_type": "opt", "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
}  # fmt: skip
_KIN = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def opt(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**_OPT, **sizes, "ffn_dim": 4 * width, "word_embed_proj_dim": width, **more}


def kin(shape: tuple[int, int, int, int, int, int], **more: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    sizes = dict(zip(names + heads, shape, strict=True))
    return {**_KIN, **sizes, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **more}


def qwen(shape: tuple[int, int, int, int, int, int], kind: str, **more: Any) -> dict[str, Any]:
    windows = {"max_window_layers": shape[3], "sliding_window": 131072, "use_sliding_window": False}
    return kin(shape, model_type=kind, rope_theta=1000000.0, max_position_embeddings=131072, **windows | more)


_7B, _8B = (32000, 4096, 11008, 32, 32, 32), (128256, 4096, 14336, 32, 32, 8)
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40} | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads"), 40
)
_LLAMA_2 = kin(_7B, max_position_embeddings=4096, pretraining_tp=1, rope_scaling=None)
_PROSPARSE = _LLAMA_2 | {
    "architectures": ["SparseLlamaForCausalLM"], "hidden_act": "fatrelu", "hidden_act_param": 0.01,
    "model_type": "sparsellama", "auto_map": {
        "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
        "AutoModel": "modeling_sparsellama.SparseLlamaModel",
        "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
    },
}  # fmt: skip
_HEADS = {"attention_bias": False, "head_dim": 128, "sliding_window": None}

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "opt-125m": (125_239_296, opt(768, 12, 12)),
    "opt-350m": (331_196_416, opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False)),
    "opt-6.7b": (6_658_473_984, opt(4096, 32, 32)),
    "opt-66b": (65_719_701_504, opt(9216, 64, 72)),
    "opt-iml-1.3b": (1_315_758_080, opt(2048, 24, 32, enable_bias=True, layer_norm_elementwise_affine=True)),
    "galactica-125m": (
        124_947_456,
        opt(768, 12, 12, activation_function="gelu", enable_bias=False, vocab_size=50000)
        | {"layer_norm_elementwise_affine": True, "learned_embeddings": True, "scale_embeddings": False},
    ),
    "llama-7b": (6_738_415_616, {**_LLAMA_2, "max_position_embeddings": 2048, "max_sequence_length": 2048}),
    "Llama-2-7b": (6_738_415_616, _LLAMA_2),
    "vicuna-7b-v1.5-16k": (6_738_415_616, {**_LLAMA_2, "rope_scaling": {"factor": 4.0, "type": "linear"}}),
    "Meta-Llama-3-8B": (8_030_261_248, kin(_8B, max_position_embeddings=8192, rope_theta=500000.0)),
    "Llama-3.1-8B": (
        8_030_261_248,
        kin(_8B, max_position_embeddings=131072, rope_theta=500000.0, mlp_bias=False)
        | {
            "rope_scaling": {**_LLAMA_3, "factor": 8.0, "rope_type": "llama3"},
            "eos_token_id": [128001, 128008],
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        kin((128256, 2048, 8192, 16, 32, 8), rope_theta=500000.0, max_position_embeddings=131072, head_dim=64)
        | {"rope_scaling": {**_LLAMA_3, "factor": 32.0, "rope_type": "llama3"}, "tie_word_embeddings": True},
    ),
    "SmolLM2-135M": (
        134_515_008,
        kin((49152, 576, 1536, 30, 9, 3), rope_theta=100000, max_position_embeddings=8192)
        | {"tie_word_embeddings": True, "is_llama_config": True, "rope_interleaved": False},
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        kin((32000, *_8B[1:]), model_type="mistral", rope_theta=10000.0, sliding_window=4096)
        | {"max_position_embeddings": 32768},
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        kin((32768, *_8B[1:]), model_type="mistral", rope_theta=1000000.0, sliding_window=None)
        | {"max_position_embeddings": 32768},
    ),
    "Qwen2-7B": (7_615_616_512, qwen((152064, 3584, 18944, 28, 28, 4), "qwen2")),
    "Qwen2.5-14B": (14_770_033_664, qwen((152064, 5120, 13824, 48, 40, 8), "qwen2", use_mrope=False)),
    "Qwen3-0.6B": (
        596_049_920,
        qwen((151936, 1024, 3072, 28, 16, 8), "qwen3", tie_word_embeddings=True, **_HEADS),
    ),
    "Qwen3-8B": (8_190_735_360, qwen((151936, 4096, 12288, 36, 32, 8), "qwen3", **_HEADS)),
    "ReluLLaMA-7B": (6_738_415_616, {**_LLAMA_2, "hidden_act": "relu"}),
    "prosparse-llama-2-7b": (6_738_415_616, _PROSPARSE),
    "prosparse-llama-2-13b": (13_015_864_320, _PROSPARSE | _13B),
}
"""The number of parameters that is told of each, and its config.json."""

_QWEN = PUBLISHED["Qwen2.5-14B"][1]
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "ProSparse, called llama": (
        "hidden_act = 'fatrelu'.*set model_type to sparsellama",
        {**_LLAMA_2, "hidden_act": "fatrelu"},
    ),
    "ProSparse, shifted": ("hidden_act = 'shiftrelu'", {**_PROSPARSE, "hidden_act": "shiftrelu"}),
    "Llama-2-7B-GPTQ": (
        "quantization_config.*use the original weights",
        {**_LLAMA_2, "quantization_config": {"bits": 4, "quant_method": "gptq"}},
    ),
    "Qwen2.5 beyond 32k": (
        "unsupported RoPE; got rope_type = 'yarn'",
        {**_QWEN, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    ),
    "Qwen3-30B-A3B": ("unsupported model_type; got 'qwen3_moe'", {**_QWEN, "model_type": "qwen3_moe"}),
}


def new_spelling(old: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it."""
    new = {
        key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    new["dtype"] = old["torch_dtype"]
    if old["model_type"] == "opt":
        return new
    scaling = {"rope_type": "default", **(old.get("rope_scaling") or {})}
    scaling["rope_type"] = scaling.pop("type", scaling["rope_type"])
    new["rope_parameters"] = {**scaling, "rope_theta": old.get("rope_theta", 10000.0)}
    if old["model_type"].startswith("qwen"):
        new["layer_types"] = ["full_attention"] * old["num_hidden_layers"]
    return new


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name):
    count, data = PUBLISHED[name]
    config = config_from_hf(data)
    assert costs.weights_bytes(config, "float16") == 2 * count
    assert config_from_hf(new_spelling(data)) == config


def test_what_their_sizes_do_not_tell():
    read = {name: config_from_hf(data) for name, (_, data) in PUBLISHED.items()}
    assert {name for name, config in read.items() if config.tie_embeddings} == {
        name
        for name in PUBLISHED
        if name.startswith(("opt", "gal", "Smol")) or name in ("Llama-3.2-1B", "Qwen3-0.6B")
    }
    assert {name for name, config in read.items() if config.sliding_window} == {"Mistral-7B-v0.1"}
    assert {name for name, config in read.items() if config.neuron_sparsity} == {
        name for name in PUBLISHED if name.startswith(("opt", "prosparse")) or name == "ReluLLaMA-7B"
    }
    assert read["ReluLLaMA-7B"].gated_mlp and read["prosparse-llama-2-7b"].gated_mlp
    assert {
        name: config.activation_threshold for name, config in read.items() if config.activation_threshold
    } == {
        "prosparse-llama-2-7b": 0.01,
        "prosparse-llama-2-13b": 0.01,
    }
    assert {name for name, config in read.items() if config.norm_position == "post"} == {"opt-350m"}
    assert read["Llama-3.2-1B"].rope == pj.RopeConfig(
        theta=500000.0, scaling="llama3", factor=32.0, original_max_positions=8192
    )
    assert read["vicuna-7b-v1.5-16k"].rope == pj.RopeConfig(scaling="linear", factor=4.0)
    assert read["Qwen2-7B"].qkv_bias and not read["Qwen3-8B"].qkv_bias and read["Qwen3-8B"].qk_norm


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    words, data = REFUSED[name]
    with refuses(pj.UnsupportedConfigError, words):
        config_from_hf(data)
