"""What a configuration accepts, refuses by name, and writes as JSON."""

import dataclasses
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

import polarjax as pj
from tests.model import zoo
from tests.one_line import refuses

OPT, LLAMA = zoo.CONFIGS["opt"], zoo.CONFIGS["llama-gqa"]
positive = st.integers(1, 10**6)
number = st.floats(1e-8, 1e8)


@st.composite
def configs(draw) -> pj.ModelConfig:
    """Any valid configuration."""
    groups, layers = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    window = st.none() | positive
    positions = draw(st.sampled_from(["rope", "learned"]))
    ropes = st.builds(
        pj.RopeConfig,
        theta=number,
        scaling=st.sampled_from([None, "linear", "llama3"]),
        factor=number,
        low_freq_factor=st.floats(0.5, 2.0),
        high_freq_factor=st.floats(2.5, 9.0),
        original_max_positions=positive,
    )
    flags = {
        field.name: draw(st.booleans()) for field in dataclasses.fields(pj.ModelConfig) if field.type is bool
    }
    return pj.ModelConfig(
        vocab_size=draw(positive),
        num_layers=layers,
        d_model=draw(positive),
        d_ff=draw(positive),
        num_heads=groups * draw(st.integers(1, 8)),
        num_kv_heads=groups,
        head_dim=2 * draw(positive),
        max_positions=draw(positive),
        norm=draw(st.sampled_from(["rms", "layer"])),
        norm_eps=draw(number),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        activation=(activation := draw(st.sampled_from(["relu", "silu", "gelu"]))),
        activation_threshold=draw(st.floats(0, 9, width=32)) if activation == "relu" else 0.0,
        positions=positions,
        position_offset=draw(st.integers(0, 4)),
        rope=draw(ropes) if positions == "rope" else None,
        sliding_window=draw(window | st.tuples(*[window] * layers)),
        embed_dim=draw(window),
        **flags,
    )


@given(configs())
def test_json_gives_back_an_equal_and_hashable_config(config: pj.ModelConfig):
    data = config.to_json()
    again = pj.ModelConfig.from_json(json.loads(json.dumps(data)))
    assert again == config
    assert ("activation_threshold" in data) == (config.activation_threshold > 0)  # as before there was one
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        (OPT, {"num_layers": 0}, "num_layers"),
        (OPT, {"d_model": -24}, "d_model"),
        (OPT, {"d_ff": 40.0}, "d_ff"),
        (OPT, {"vocab_size": "61"}, "vocab_size"),
        (OPT, {"max_positions": None}, "max_positions"),
        (OPT, {"num_heads": True}, "num_heads"),
        (LLAMA, {"num_kv_heads": 3}, "num_kv_heads.*divisor of num_heads = 4"),
        (OPT, {"norm": "batch"}, "norm.*'rms' or 'layer'"),
        (OPT, {"norm_position": "sandwich"}, "norm_position"),
        (OPT, {"activation": "swish"}, "activation"),
        (OPT, {"activation_threshold": -0.01}, "activation_threshold.*zero or more"),
        (OPT, {"activation_threshold": float("nan")}, "activation_threshold"),
        (OPT, {"activation_threshold": 1e39}, "activation_threshold.*finite in float32"),
        (OPT, {"activation_threshold": True}, "activation_threshold"),
        (OPT, {"activation_threshold": "0.01"}, "activation_threshold"),
        (LLAMA, {"activation_threshold": 0.01}, "activation_threshold.*0, because activation = 'silu'"),
        (OPT, {"positions": "alibi"}, "positions"),
        (OPT, {"norm_eps": 0.0}, "norm_eps"),
        (OPT, {"norm_eps": float("nan")}, "norm_eps"),
        (OPT, {"norm_eps": "1e-5"}, "norm_eps"),
        (OPT, {"tie_embeddings": "false"}, "tie_embeddings.*True or False"),
        (OPT, {"mlp_bias": None}, "mlp_bias"),
        (OPT, {"rope": pj.RopeConfig()}, "rope.*'learned'"),
        (LLAMA, {"rope": None}, "rope.*a RopeConfig"),
        (LLAMA, {"rope": {"theta": 1e4}}, "rope.*a RopeConfig"),
        (LLAMA, {"head_dim": 7}, "head_dim.*even"),
        (OPT, {"position_offset": -1}, "position_offset"),
        (OPT, {"position_offset": 0.5}, "position_offset"),
        (OPT, {"sliding_window": 0}, "sliding_window"),
        (OPT, {"sliding_window": (4,)}, "sliding_window.*2 layers"),
        (OPT, {"sliding_window": (4, -1)}, "sliding_window"),
        (OPT, {"sliding_window": [4, 4.5]}, "sliding_window"),
        (OPT, {"embed_dim": 0}, "embed_dim"),
    ],
)
def test_refuses_a_value_by_its_name(config, change, named):
    with refuses(pj.UnsupportedConfigError, named):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"theta": 0.0}, "rope.theta"),
        ({"theta": float("inf")}, "rope.theta"),
        ({"scaling": "yarn"}, "rope.scaling.*'linear' or 'llama3'"),
        ({"factor": -2.0}, "rope.factor"),
        ({"factor": None}, "rope.factor"),
        ({"scaling": "llama3"}, "rope.original_max_positions"),
        (
            {"scaling": "llama3", "original_max_positions": 8, "low_freq_factor": 4.0},
            "rope.low_freq_factor.*high_freq_factor = 4.0",
        ),
    ],
)
def test_refuses_a_rotary_value_by_its_name(values, named):
    with refuses(pj.UnsupportedConfigError, named):
        pj.RopeConfig(**values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 3}, "keys.*hidden_size"),
        ({"rope": {"theta": 1e4, "beta_fast": 32}}, "keys.*beta_fast"),
        ({"rope": "llama3"}, "rope"),
    ],
)
def test_refuses_json_keys_it_does_not_know(change, named):
    with refuses(pj.UnsupportedConfigError, named):
        pj.ModelConfig.from_json(LLAMA.to_json() | change)


def test_refuses_json_without_a_required_key():
    data = OPT.to_json()
    del data["d_ff"], data["vocab_size"]
    with refuses(pj.UnsupportedConfigError, r"keys.*no d_ff, vocab_size"):
        pj.ModelConfig.from_json(data)


def test_derived_values():
    assert [zoo.CONFIGS[name].q_per_group for name in ("llama-mha", "llama-gqa", "llama-mqa")] == [1, 2, 4]
    assert OPT.neuron_sparsity
    assert not LLAMA.neuron_sparsity
    assert [zoo.CONFIGS["window"].window(layer) for layer in range(2)] == [3, None]
    assert [dataclasses.replace(OPT, sliding_window=5).window(layer) for layer in range(2)] == [5, 5]
