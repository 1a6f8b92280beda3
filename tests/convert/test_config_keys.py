"""Keys of config.json that the class does not read: refused where they change what weights mean, else ignored.

And keys by which transformers chooses another class: what its AutoModelForCausalLM makes of them is asked here.
"""

import functools
import json
import re
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st

import polarjax as pj
from checkpoints_convert import config_from_hf, convert_checkpoint
from checkpoints_convert.config_reader import DEFAULTS, HARMLESS
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.hf_config import read_config
from polarjax.model.parameters import parameters, with_parameters
from tests.convert import hf_models
from tests.model import zoo
from tests.one_line import refuses
from tests.tolerances import assert_close

MEANING = [
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {}},
    {"quantization": {"group_size": 64, "bits": 4}},
    {"compression_config": {"format": "pack-quantized"}},
    {"load_in_4bit": True},
    {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    {"partial_rotary_factor": 0.5},
    {"rotary_pct": 0.25},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
]
_THRESHOLDS = [{"hidden_act_param": 0.01}, {"relu_threshold": 0.1}]
CLASSES = {
    "llama": transformers.LlamaConfig,
    "ministral": transformers.MinistralConfig,
    "mistral": transformers.MistralConfig,
    "opt": transformers.OPTConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "sparsellama": hf_models.SparseLlamaConfig,
}
BARE = {name: {**kind().to_dict(), "model_type": name} for name, kind in CLASSES.items()}
_READ_BY_MODELS = {"head_dim", "original_max_position_embeddings", "rope_theta", "rope_scaling", "dtype"}
_LIKE_WEIGHTS = re.compile("quant|bits|auto_map|act|threshold|rot|rope|per_layer|encoder_decoder")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("change", MEANING, ids=str)
def test_keys_that_say_that_the_weights_mean_something_else(name, change):
    """In every family, whether its class reads them or not."""
    base = {key: value for key, value in BARE[name].items() if key != "rope_parameters"}
    if name == "sparsellama" and "auto_map" in change:
        return  # its published models came with code of their own
    with refuses(pj.UnsupportedConfigError, r"\w"):
        config_from_hf(base | change)


@pytest.mark.parametrize("name", sorted({*CLASSES} - {"sparsellama"}))
@pytest.mark.parametrize("change", [*_THRESHOLDS, {"hidden_act": "fatrelu"}], ids=str)
def test_thresholds_are_refused_where_they_are_not_read(name, change):
    with refuses(pj.UnsupportedConfigError, "sparsellama"):
        config_from_hf(BARE[name] | change)


def _unread(name: str) -> list[str]:
    """Keys that other families or nobody reads."""
    others = {key for other in BARE.values() for key in other}
    fields = {*BARE[name], *vars(CLASSES[name]())} | _READ_BY_MODELS
    fields |= {"layer_types"} if name == "mistral" else set()  # AutoConfig takes another class
    known = sorted(key for key in others - fields if not _LIKE_WEIGHTS.search(key))
    return [
        *known,
        "use_flash_attention_2", "model_max_length", "logit_scale", "final_logit_softcapping", "attn_bias",
    ]  # fmt: skip


JSON = st.booleans() | st.integers(-3, 9) | st.floats(-2, 2) | st.sampled_from(["x", "", [], {}, ["full"]])


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25)
@given(data=st.data())
def test_keys_that_the_class_does_not_read_change_nothing(name, data):
    keys = st.sampled_from(_unread(name)) | st.text("abcdefg_", min_size=3, max_size=8).filter(
        lambda key: key not in BARE[name] and not _LIKE_WEIGHTS.search(key)
    )
    change = data.draw(st.dictionaries(keys, JSON, min_size=1, max_size=4))
    found = read_config(BARE[name] | change)
    assert found.config == config_from_hf(BARE[name])
    assert len(found.notes) <= 1
    assert all(key in found.notes[0] for key in change if key not in HARMLESS and key not in DEFAULTS)


def test_a_note_holds_no_escapes_of_a_terminal():
    (note,) = read_config({**BARE["llama"], "\x1b[2Kx\u202ey": 1}).notes
    assert note.endswith(r"ignored: \x1b[2Kx\u202ey")


FULL, SLIDING = "full_attention", "sliding_attention"
TOKENS = np.random.default_rng(0).integers(3, hf_models.VOCAB, (1, 12)).astype(np.int32)
LISTS = [*map(list, product((FULL, SLIDING, "attention"), repeat=2)), [FULL], [FULL, "chunked_attention"]]
WINDOWS = st.fixed_dictionaries(
    {},
    optional={
        "layer_types": st.none() | st.sampled_from(LISTS),
        "sliding_window": st.sampled_from([None, 5]),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.integers(0, 2),
    },
)


@functools.cache
def theirs(name: str) -> torch.nn.Module:
    return hf_models.make(name)


@functools.cache
def arrays(name: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        theirs(name).save_pretrained(f"{folder}/hf")
        return parameters(pj.load(convert_checkpoint(f"{folder}/hf", f"{folder}/out").path).model)


_forward = zoo.jit(pj.forward)


@functools.cache
def our_logits(name: str, config: pj.ModelConfig) -> np.ndarray:
    model = with_parameters(config, arrays(name))
    return np.asarray(_forward(model, TOKENS, np.array([12], np.int32))[0])


def their_logits(name: str, data: dict) -> np.ndarray | None:
    """Those of the class that transformers takes; None where it refuses the config, or has no logits for it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(data))
            config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        model.load_state_dict(theirs(name).state_dict())
        with torch.no_grad():
            return model(torch.from_numpy(TOKENS).long(), use_cache=False).logits.numpy()
    except (ValueError, KeyError, StrictDataclassError):
        return None


@pytest.mark.parametrize("name", ["llama3-gqa", "mistral-gqa", "ministral-window", "qwen2-gqa", "qwen3-gqa"])
@settings(max_examples=25)
@given(change=WINDOWS)
def test_windows_are_those_of_the_class_that_transformers_takes(name, change):
    """What is refused here has no logits there."""
    data = theirs(name).config.to_dict() | {"sliding_window": 5}
    data = json.loads(json.dumps({key: data[key] for key in data if key != "layer_types"})) | change
    expected = their_logits(name, data)
    try:
        config = config_from_hf(data)
    except pj.UnsupportedConfigError:
        assert expected is None
        return
    if expected is not None:
        assert_close(our_logits(name, config), expected, "parity")
