"""Layouts and the accounting of tensors."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import polarjax as pj
from checkpoints_convert import config_from_hf
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.rules import Layout, expected_tensors, letter_sizes, make_plan, transposed
from polarjax.model.parameters import abstract, parameters
from tests.convert import hf_models

SIZES = st.fixed_dictionaries({letter: st.integers(1, 5) for letter in "DKGHFV"})
LAYOUTS = ("V D -> V D", "(K G H) D -> D K G H", "D (K G H) -> K G H D", "D F -> F D", "(K H) -> K H")


def config_of(name: str) -> tuple[pj.ModelConfig, str]:
    config = hf_models.make(name).config
    return config_from_hf(config.to_dict()), config.model_type


def tensors_of(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes as transformers itself names them; tied heads are not written."""
    model = hf_models.make(name)
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}


def placed(layout: Layout, source: np.ndarray, step: int) -> np.ndarray:
    """The parameter that conversion makes of a tensor, `step` rows at a time."""
    rows, out = (
        source.reshape(len(source) if source.ndim == 2 else 1, -1),
        np.empty(source.size, source.dtype),
    )
    for start in range(0, len(rows), step):
        layout.place(rows[start : start + step], start, out)
    return out


@given(sizes=SIZES, text=st.sampled_from(LAYOUTS))
def test_layout_moves_every_element_to_its_letters(sizes, text):
    layout = Layout.parse(text)
    source = np.arange(np.prod(layout.source_shape(sizes)), dtype=np.float32).reshape(
        layout.source_shape(sizes)
    )
    shape = tuple(sizes[letter] for letter in layout.target)
    split = source.reshape([sizes[letter] for axis in layout.source for letter in axis])
    expected = np.einsum(f"{''.join(layout.source)}->{layout.target}", split)
    for step in (1, 2, source.size):
        np.testing.assert_array_equal(placed(layout, source, step).reshape(shape), expected)
    np.testing.assert_array_equal(layout.to_source(expected, source.shape), source)


@pytest.mark.parametrize("text", ["A B C -> B A C", "(A B) C -> B C A", "A B -> A", "A -> A B"])
def test_layout_refuses_what_is_not_a_rotation(text):
    with pytest.raises(ValueError, match="not a rotation"):
        Layout.parse(text)


@given(rows=st.integers(0, 600), columns=st.integers(1, 5), dtype=st.sampled_from(["f4", "f2", "bfloat16"]))
def test_transposed(rows, columns, dtype):
    array = np.arange(rows * columns).reshape(rows, columns).astype(jnp.dtype(dtype))
    result = transposed(array)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, array.T)


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_every_tensor_of_transformers_has_its_parameter(name):
    config, model_type = config_of(name)
    plan = make_plan(FAMILIES[model_type], config, tensors_of(name), where=name)
    assert sorted(step.source for step in plan.steps) == sorted(tensors_of(name))
    assert sorted(step.target for step in plan.steps) == sorted(parameters(abstract(config)))
    assert plan.skipped == plan.equal == ()


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_source_shapes_follow_from_the_config(name):
    config, model_type = config_of(name)
    sizes = letter_sizes(config)
    expected = expected_tensors(FAMILIES[model_type], config)
    assert {key: step.layout.source_shape(sizes) for key, step in expected.items()} == tensors_of(name)


def plan_of(name: str, change) -> object:
    config, model_type = config_of(name)
    found = tensors_of(name)
    change(found)
    return make_plan(FAMILIES[model_type], config, found, where="HERE")


def test_one_report_of_all_faults():
    def change(found):
        for i in range(3):
            del found[f"model.layers.{i}.mlp.up_proj.weight"]
            found[f"model.layers.{i}.mlp.up_proj.bias"] = (40,)
        found["model.embed_tokens.weight"] = (64, 24)
        found["norm.weight"] = (24,)

    with pytest.raises(pj.CheckpointError) as error:
        plan_of("llama-gqa", change)
    text = str(error.value)
    assert text.startswith("HERE: the tensors do not fit config.json; got 3 missing: ")
    assert "model.layers.2.mlp.up_proj.weight" in text
    assert "3 unknown: model.layers.0.mlp.up_proj.bias" in text
    assert "2 duplicated under another name: model.norm.weight, norm.weight" in text
    assert "1 of the wrong shape: model.embed_tokens.weight [64, 24] instead of [61, 24]" in text
    assert "\n" not in text


def test_a_report_names_ten_of_many():
    with pytest.raises(pj.CheckpointError) as error:
        plan_of("opt", lambda found: found.clear())
    assert str(error.value).count("model.decoder.") == 10
    assert "and 42 more" in str(error.value)


@pytest.mark.parametrize(
    "suffix", ["qweight", "g_idx", "SCB", "weight_scale_inv", "quant_state.bitsandbytes__nf4"]
)
def test_quantized_tensors_are_called_so(suffix):
    def change(found):
        found[f"model.layers.0.mlp.up_proj.{suffix}"] = (1,)

    with pytest.raises(pj.CheckpointError, match="quantized checkpoints are unsupported"):
        plan_of("llama-gqa", change)


def test_rotary_buffers_are_skipped():
    def change(found):
        found["model.layers.0.self_attn.rotary_emb.inv_freq"] = (3,)

    assert plan_of("llama-gqa", change).skipped == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


@pytest.mark.parametrize(
    ("name", "long", "short"), [("opt", "model.decoder.", "decoder."), ("llama-gqa", "model.", "")]
)
def test_files_of_the_bare_body(name, long, short):
    def change(found):
        for key in [key for key in found if key.startswith(long)]:
            found[short + key.removeprefix(long)] = found.pop(key)

    plan = plan_of(name, change)
    assert {step.source.startswith(long) for step in plan.steps} == {False}


def test_a_head_is_required_unless_tied():
    with pytest.raises(
        pj.CheckpointError, match=r"1 missing: lm_head\.weight.*set tie_word_embeddings to true"
    ):
        plan_of("llama-gqa", lambda found: found.pop("lm_head.weight"))


def test_an_explicit_head_of_a_tied_model_must_equal_the_table():
    plan = plan_of("opt", lambda found: found.update({"lm_head.weight": (61, 24)}))
    assert plan.equal == (("lm_head.weight", "model.decoder.embed_tokens.weight"),)
