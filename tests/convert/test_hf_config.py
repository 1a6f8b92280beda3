"""Reading config.json: both spellings, and refusals by name."""

import dataclasses
import json

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

import polarjax as pj
from checkpoints_convert import config_from_hf
from checkpoints_convert.config_reader import ORIGINAL
from checkpoints_convert.hf_config import read_config
from tests.convert import hf_models
from tests.model import zoo
from tests.one_line import refuses

OPT = {
    "_name_or_path": "opt-125m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


PROSPARSE = LLAMA | {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.01}

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN = {
    **MISTRAL,
    "model_type": "qwen2",
    "max_window_layers": 3,
    "use_sliding_window": False,
    "use_mrope": False,
    "rope_theta": 1000000.0,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def new_spelling(old: dict) -> dict:
    new = {
        key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    scaling = dict(old.get("rope_scaling") or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    return {
        **new,
        "dtype": old["torch_dtype"],
        "rope_parameters": {**scaling, "rope_theta": old["rope_theta"]},
    }


def test_llama3_both_spellings():
    config = config_from_hf(LLAMA)
    assert config == config_from_hf(new_spelling(LLAMA))
    assert config.rope == pj.RopeConfig(
        theta=500000.0, scaling="llama3", factor=8.0, original_max_positions=8192
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff) == (32, 8, 128, 14336)
    assert (config.norm, config.norm_eps, config.qkv_bias, config.tie_embeddings) == (
        "rms",
        1e-5,
        False,
        False,
    )


@pytest.mark.parametrize(
    "scaling", [None, {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2}]
)
def test_other_ropes_both_spellings(scaling):
    old = {**LLAMA, "rope_scaling": scaling}
    assert config_from_hf(old) == config_from_hf(new_spelling(old))


def test_llama2_defaults_for_absent_keys():
    absent = ("num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias")
    config = config_from_hf({key: value for key, value in LLAMA.items() if key not in absent})
    assert config.num_kv_heads == config.num_heads
    assert config.rope == pj.RopeConfig(theta=10_000.0)
    assert not config.tie_embeddings


def test_opt():
    config = config_from_hf(OPT)
    assert (config.norm_position, config.final_norm, config.embed_dim) == ("pre", True, None)
    assert (config.activation, config.gated_mlp, config.position_offset) == ("relu", False, 2)
    assert config.tie_embeddings
    assert config.norm_bias and config.qkv_bias and config.out_bias and config.mlp_bias


def test_opt_350m():
    config = config_from_hf({**OPT, "word_embed_proj_dim": 512, "do_layer_norm_before": False})
    assert (config.norm_position, config.final_norm, config.embed_dim) == ("post", False, 512)


def without(data: dict, *keys: str) -> dict:
    return {key: value for key, value in data.items() if key not in keys}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (MISTRAL, 4096),
        (without(MISTRAL, "sliding_window"), 4096),
        ({**MISTRAL, "sliding_window": None}, None),
        ({**MISTRAL, "layer_types": [SLIDING] * 4}, 4096),
        ({**MISTRAL, "layer_types": [FULL] * 4}, None),
        ({**MISTRAL, "layer_types": ["attention", SLIDING] * 2}, (None, 4096) * 2),
        ({**MISTRAL, "layer_types": None}, 4096),
        ({**MISTRAL, "layer_types": [FULL] * 4, "sliding_window": None}, None),
        ({**MISTRAL, "model_type": "ministral"}, 4096),
        (QWEN, None),
        (without(QWEN, "use_sliding_window"), None),
        ({**QWEN, "use_sliding_window": True}, (None, None, None, 4096)),
        ({**QWEN, "use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({**QWEN, "use_sliding_window": True, "max_window_layers": 4}, None),
        ({**QWEN, "use_sliding_window": True, "sliding_window": None}, None),
        ({**without(QWEN, "sliding_window"), "use_sliding_window": True}, (None, None, None, 4096)),
        (
            {**QWEN, "use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
            (4096, None, 4096, None),
        ),
        ({**QWEN, "layer_types": [FULL] * 4, "sliding_window": None}, None),
    ],
)
def test_sliding_windows(data, expected):
    assert config_from_hf(data).sliding_window == expected


def test_families_differ_in_their_defaults():
    bare = without(
        MISTRAL, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "sliding_window"
    )
    configs = {
        name: config_from_hf({**bare, "model_type": name}) for name in ("llama", "mistral", "qwen2", "qwen3")
    }
    told = {name: (c.num_kv_heads, c.max_positions, c.head_dim, c.qkv_bias) for name, c in configs.items()}
    assert told == {
        "llama": (32, 2048, 128, False),
        "mistral": (8, 131072, 128, False),
        "qwen2": (32, 32768, 128, True),
        "qwen3": (32, 32768, 128, False),
    }
    assert {name for name, config in configs.items() if config.qk_norm} == {"qwen3"}


@pytest.mark.parametrize(
    "name", ["LlamaConfig", "MistralConfig", "MinistralConfig", "Qwen2Config", "Qwen3Config", "OPTConfig"]
)
def test_defaults_are_those_of_transformers(name):
    theirs = getattr(transformers, name)()
    kept = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "ffn_dim")
    sizes = ("num_hidden_layers", "num_attention_heads")
    bare = {key: value for key, value in theirs.to_dict().items() if key in kept + sizes}
    assert config_from_hf(bare) == config_from_hf(theirs.to_dict())


@pytest.mark.parametrize(
    ("change", "activation", "threshold"),
    [
        ({}, "relu", 0.01),
        ({"hidden_act_param": 1}, "relu", 1.0),
        ({"hidden_act_param": 0}, "relu", 0.0),
        ({"hidden_act_param": None}, "relu", 0.0),
        ({"hidden_act": "relu"}, "relu", 0.0),
        ({"hidden_act": None}, "silu", 0.0),
        ({"hidden_act": "silu", "hidden_act_param": "unread"}, "silu", 0.0),
    ],
)
def test_thresholds_of_prosparse(change, activation, threshold):
    """Only fatrelu has one, and without a parameter it is a plain ReLU."""
    config = config_from_hf(PROSPARSE | change)
    assert (config.activation, config.activation_threshold) == (activation, threshold)
    assert config == dataclasses.replace(
        config_from_hf(LLAMA), activation=activation, activation_threshold=threshold
    )


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_what_transformers_writes_is_read(name):
    written = hf_models.make(name).config
    assert config_from_hf(json.loads(written.to_json_string())) == config_from_hf(written.to_dict())


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (LLAMA, {"model_type": "gpt2"}, ["unsupported model_type", "gpt2", "opt or llama"]),
        (LLAMA, {"model_type": None}, ["unsupported model_type"]),
        (LLAMA, {"model_type": ["llama"]}, ["unsupported model_type"]),
        (LLAMA, {"quantization_config": {"bits": 4}}, ["quantization_config", "quantized checkpoints"]),
        (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["unsupported RoPE", "yarn"]),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["unsupported RoPE", "longrope"]),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            ["partial_rotary"],
        ),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["unsupported RoPE", "dynamic"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, ["unsupported RoPE"]),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, ["a key is missing: factor"]),
        (LLAMA, {"rope_parameters": {"rope_type": "default"}}, ["rope_parameters disagree"]),
        (LLAMA, {"hidden_act": "gelu_new"}, ["an unsupported activation", "gelu_new"]),
        (LLAMA, {"hidden_act": "fatrelu"}, ["an unsupported activation", "fatrelu", "sparsellama"]),
        (PROSPARSE, {"hidden_act": "shiftrelu"}, ["an unsupported activation", "shiftrelu"]),
        (PROSPARSE, {"hidden_act_param": -0.01}, ["a value out of range", "hidden_act_param"]),
        (PROSPARSE, {"hidden_act_param": float("nan")}, ["a value out of range", "hidden_act_param"]),
        (PROSPARSE, {"hidden_act_param": 10**400}, ["a value out of range", "hidden_act_param"]),
        (PROSPARSE, {"hidden_act_param": "0.01"}, ["a value of the wrong type", "hidden_act_param"]),
        (PROSPARSE, {"hidden_act_param": True}, ["a value of the wrong type", "hidden_act_param"]),
        (LLAMA, {"hidden_size": "4096"}, ["a value of the wrong type", "hidden_size = '4096',"]),
        (LLAMA, {"hidden_size": True}, ["a value of the wrong type", "hidden_size = True,"]),
        (LLAMA, {"hidden_size": -64}, ["a value out of range", "hidden_size = -64,"]),
        (LLAMA, {"hidden_size": 4097}, ["not divisible by the number of heads", "4097"]),
        (LLAMA, {"hidden_size": None}, ["a key is missing: hidden_size"]),
        (LLAMA, {"num_hidden_layers": -1}, ["a value out of range", "num_hidden_layers"]),
        (LLAMA, {"num_hidden_layers": 10**12}, ["a value out of range", "num_hidden_layers"]),
        (LLAMA, {"num_hidden_layers": 0}, ["a value out of range", "num_hidden_layers"]),
        (LLAMA, {"num_key_value_heads": 5}, ["num_kv_heads"]),
        (LLAMA, {"rms_norm_eps": 0}, ["a value out of range", "rms_norm_eps"]),
        (LLAMA, {"rms_norm_eps": 10**400}, ["a value out of range", "rms_norm_eps"]),
        (LLAMA, {"rope_theta": 10**400}, ["a value out of range", "rope_theta"]),
        (LLAMA, {"rms_norm_eps": float("nan")}, ["a value out of range", "rms_norm_eps"]),
        (LLAMA, {"tie_word_embeddings": "no"}, ["a value of the wrong type", "tie_word_embeddings"]),
        (MISTRAL, {"layer_types": [SLIDING] * 3}, ["layer_types", "each of the 4 layers"]),
        (MISTRAL, {"layer_types": [FULL] * 3 + ["chunked_attention"]}, ["layer_types", "chunked_attention"]),
        (MISTRAL, {"layer_types": "full_attention"}, ["a value of the wrong type", "layer_types"]),
        (
            MISTRAL,
            {"layer_types": [FULL, SLIDING] * 2, "sliding_window": None},
            ["sliding layer without a window"],
        ),
        (LLAMA, {"configuration_files": ["config.4.0.0.json"]}, ["configuration_files", "another file"]),
        (LLAMA, {"transformers_weights": "pytorch_model.bin"}, ["transformers_weights", "*.safetensors"]),
        (LLAMA, {"transformers_weights": "../x.safetensors"}, ["transformers_weights"]),
        (LLAMA, {"transformers_weights": ""}, ["transformers_weights"]),
        (LLAMA, {"transformers_weights": ["a"]}, ["a value of the wrong type", "transformers_weights"]),
        (QWEN, {"layer_types": ["chunked_attention"] * 4}, ["layer_types", "chunked_attention"]),
        (QWEN, {"layer_types": [SLIDING] * 4}, ["layer_types", "sliding layer without a window"]),
        (QWEN, {"max_window_layers": -1}, ["max_window_layers"]),
        (OPT, {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine"]),
        (OPT, {"hidden_size": 100}, ["not divisible by the number of heads"]),
        (OPT, {"ffn_dim": None}, ["a key is missing: ffn_dim"]),
        (OPT, {"is_encoder_decoder": True}, ["is_encoder_decoder"]),
    ],
    ids=str,
)
def test_refused_by_name(base, change, words):
    with pytest.raises(pj.UnsupportedConfigError) as error:
        config_from_hf({**base, **change})
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("base", "change", "same_as", "noted"),
    [
        (OPT, {"num_key_value_heads": 4}, {}, "num_key_value_heads"),
        (LLAMA, {"use_flash_attention_2": True}, {}, "use_flash_attention_2"),
        (LLAMA, {"layer_types": [FULL] * 32}, {}, "layer_types"),
        (LLAMA, {"sliding_window": 5}, {}, "sliding_window"),
        (MISTRAL, {"attention_bias": False}, {}, "attention_bias"),
        (QWEN, {"attention_bias": True, "model_max_length": 9}, {}, "attention_bias, model_max_length"),
        (QWEN, {"use_mrope": True}, {}, "use_mrope"),
        (LLAMA, {"rope_scaling": LINEAR | {ORIGINAL: 9, "beta": 1}}, {"rope_scaling": LINEAR},
         f"rope_scaling.beta, rope_scaling.{ORIGINAL}"),
        (MISTRAL, {"rope_scaling": {"type": "default", "factor": 4.0}}, {}, "rope_scaling.factor"),
        (LLAMA, {"rope_parameters": LLAMA["rope_scaling"] | {"rope_theta": 500000.0}}, {}, None),
        (LLAMA, {"quantization_config": None, "is_decoder": True, "torchscript": False}, {}, None),
        (LLAMA, {"auto_map": {"AutoTokenizer": "code.Tokenizer"}}, {}, None),
    ],
    ids=str,
)  # fmt: skip
def test_ignored_keys(base, change, same_as, noted):
    found = read_config(base | change)
    assert found.config == config_from_hf(base | same_as)
    assert found.notes == (
        (f"config.json has keys that {base['model_type']} models don't read; ignored: {noted}",)
        if noted
        else ()
    )


def test_null_kv_heads_are_as_many_as_heads():
    """As in the classes, where an absent key has a default of its own."""
    assert config_from_hf(MISTRAL | {"num_key_value_heads": None}).num_kv_heads == 32
    assert config_from_hf(without(MISTRAL, "num_key_value_heads")).num_kv_heads == 8


def test_the_last_of_two_values_counts(tmp_path):
    text = json.dumps(OPT)
    (tmp_path / "config.json").write_text(text[:-1] + ', "ffn_dim": 64}')
    assert config_from_hf(tmp_path).d_ff == 64


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_config.json", "adapter.*merge_and_unload"),
        ("params.json", "HuggingFace version"),
        ("m.gguf", "GGUF"),
    ],
)
def test_folders_of_other_kinds(tmp_path, file, words):
    (tmp_path / file).write_text("{}")
    with refuses(pj.CheckpointError, words):
        config_from_hf(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([OPT, LLAMA, MISTRAL, QWEN]), st.data())
def test_changed_configs_are_read_or_refused(base, data):
    keys = st.sampled_from([*base, "rope_parameters", "head_dim", "enable_bias", "layer_types"]) | st.text(
        max_size=5
    )
    changes = data.draw(st.dictionaries(keys, VALUES, max_size=4))
    try:
        config_from_hf({**base, **changes})
    except pj.PolarjaxError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "config.json is missing"),
        ("{", "not readable as JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not readable as JSON"),
    ],
    ids=["absent", "cut", "list", "deep"],
)
def test_unreadable_files(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(pj.CheckpointError, match=words):
        config_from_hf(tmp_path)


def test_what_is_no_folder_of_huggingface(tmp_path):
    with refuses(pj.CheckpointError, "nothing: no such folder"):
        config_from_hf(tmp_path / "nothing")
    (tmp_path / "weights.txt").write_text("")
    with refuses(pj.CheckpointError, r"weights\.txt: a file, not a folder"):
        config_from_hf(tmp_path / "weights.txt")
    pj.save(tmp_path / "model", pj.Bundle(zoo.model("opt")))
    with refuses(pj.CheckpointError, "model: this is a model directory already.*polarjax export"):
        config_from_hf(tmp_path / "model")
