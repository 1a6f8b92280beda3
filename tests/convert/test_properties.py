"""What must hold for every config, every index and every set of tensors; and a short run of the fuzzer."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import polarjax as pj
from checkpoints_convert.export import written_config
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.hf_config import config_from_hf
from checkpoints_convert.rules import expected_tensors, letter_sizes, make_plan
from checkpoints_convert.weights_io import INDEX, open_weights, read_index
from polarjax.model.parameters import abstract, parameters
from tests.convert import fuzz
from tests.convert.test_rules import placed
from tests.one_line import refuses

FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def configs(draw) -> tuple[str, pj.ModelConfig]:
    """A family and a config that it can say."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    heads, groups = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]))
    layers, width = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    sizes = {
        "vocab_size": draw(st.integers(1, 50)),
        "num_layers": layers,
        "d_ff": draw(st.integers(1, 30)),
        "num_heads": heads,
        "max_positions": draw(st.integers(1, 99)),
        "activation": draw(st.sampled_from(["relu", "silu", "gelu"])),
        "tie_embeddings": draw(st.booleans()),
        "head_dim": width,
    }
    if family == "opt":
        biases, post = draw(st.booleans()), draw(st.booleans())
        embed = draw(st.integers(1, 20).filter(lambda size: size != heads * width))
        return family, pj.ModelConfig(
            **sizes,
            d_model=heads * width,
            num_kv_heads=heads,
            norm="layer",
            norm_bias=True,
            norm_position="post" if post else "pre",
            final_norm=not post and draw(st.booleans()),
            gated_mlp=False,
            mlp_bias=biases,
            qkv_bias=biases,
            out_bias=biases,
            positions="learned",
            position_offset=2,
            embed_dim=draw(st.sampled_from([None, embed])),
        )
    biases = draw(st.booleans()) and family in ("llama", "qwen3")
    window = draw(st.sampled_from([None, 3, 8])) if family not in ("llama", "sparsellama") else None
    by_layer = (
        family in ("ministral", "qwen2", "qwen3")
        and window is not None
        and layers > 1
        and draw(st.booleans())
    )
    scaling = draw(st.sampled_from([None, "linear", "llama3"]))
    factors = {"factor": 2.5} if scaling else {}
    return family, pj.ModelConfig(
        **sizes,
        d_model=draw(st.integers(1, 20)),
        num_kv_heads=groups,
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        mlp_bias=family == "llama" and draw(st.booleans()),
        qkv_bias=biases or family == "qwen2",
        out_bias=biases,
        qk_norm=family == "qwen3",
        sliding_window=(None, *[window] * (layers - 1)) if by_layer else window,
        rope=pj.RopeConfig(
            theta=draw(st.sampled_from([1e4, 5e5])),
            scaling=scaling,
            original_max_positions=16 if scaling == "llama3" else None,
            **factors,
        ),
    )


@given(case=configs())
def test_a_config_survives_being_written_and_read(case):
    family, config = case
    data = written_config(FAMILIES[family], config)
    assert data is not None
    assert config_from_hf(json.loads(json.dumps(data))) == config


@FEW
@given(case=configs())
def test_the_rules_fill_every_parameter_of_every_config_once(case):
    """And a layout there and back is the identity, for every tensor."""
    family, config = FAMILIES[case[0]], case[1]
    steps = expected_tensors(family, config)
    shapes = {name: leaf.shape for name, leaf in parameters(abstract(config)).items()}
    assert sorted(step.target for step in steps.values()) == sorted(shapes)
    sizes = letter_sizes(config)
    for step in steps.values():
        assert step.shape == shapes[step.target]
        source = np.arange(np.prod(step.shape), dtype=np.float32)
        source = source.reshape(step.layout.source_shape(sizes))
        target = placed(step.layout, source, 2).reshape(step.shape)
        np.testing.assert_array_equal(step.layout.to_source(target, source.shape), source)


@FEW
@given(case=configs(), data=st.data())
def test_one_wrong_tensor_is_always_reported_by_name(case, data):
    family, config = FAMILIES[case[0]], case[1]
    sizes = letter_sizes(config)
    found = {name: step.layout.source_shape(sizes) for name, step in expected_tensors(family, config).items()}
    assert len(make_plan(family, config, found, where="HERE").steps) == len(found)
    name = data.draw(st.sampled_from(sorted(found)))
    shape = found.pop(name)
    fault = data.draw(st.sampled_from(["missing", "unknown", "of the wrong shape"]))
    told = name
    if fault == "unknown":
        told = name + ".x"
        found |= {name: shape, told: (1,)}
    elif fault == "of the wrong shape":
        found[name] = (*shape[:-1], shape[-1] + 1)
    with refuses(pj.CheckpointError, f"1 {fault}: {told}"):
        make_plan(family, config, found, where="HERE")


PLAIN = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_. -]{0,20}\Z")
ANYTHING = st.text(max_size=12) | st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2)


@FEW
@given(places=st.dictionaries(st.text(max_size=8), PLAIN | ANYTHING, max_size=4))
def test_an_index_names_plain_files_or_is_refused(tmp_path, places):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    try:
        read = read_index(tmp_path / INDEX)
    except pj.CheckpointError as error:
        assert "\n" not in str(error)
        return
    assert read == places
    for name in read.values():
        assert (tmp_path / name).parent == tmp_path
        assert Path(name).name == name


@FEW
@given(places=st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("123"), min_size=1))
def test_shards_that_agree_with_their_index_are_read(tmp_path, places):
    for file in tmp_path.iterdir():
        file.unlink()
    for shard in set(places.values()):
        arrays = {name: np.full(3, ord(name), np.float32) for name in places if places[name] == shard}
        save_file(arrays, tmp_path / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for name, shard in places.items()}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    tensors = open_weights(tmp_path)
    assert {name: tensor.file.name for name, tensor in tensors.items()} == weight_map
    assert {name: tensor.read()[0] for name, tensor in tensors.items()} == {
        name: ord(name) for name in places
    }


@pytest.mark.parametrize("seed", range(2))
def test_spoilt_checkpoints_are_read_or_refused(seed):
    """`tests/convert/fuzz.py` for a moment; every kind of outcome occurs, so it is not blind."""
    outcomes = fuzz.run(seed, count=400)
    assert set(outcomes) == {"accepted", "CheckpointError", "UnsupportedConfigError"}
    assert min(outcomes.values()) > 10
