"""generation_config.json: what is taken over, what is refused, what is named as left out."""

import dataclasses
import json

import hypothesis.strategies as st
import numpy as np
import pytest
import transformers
from hypothesis import given

import polarjax as pj
from polarjax.generation.settings import GenerationSettings
from tests.one_line import refuses

LLAMA_3 = {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.42.3",
}
QWEN = {
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "transformers_version": "4.37.0",
}


def test_the_settings_of_llama_3():
    settings = GenerationSettings.from_json(LLAMA_3)
    assert settings.stop_ids == (128001, 128008, 128009)
    assert settings.sampler == pj.Categorical(
        0.6, top_k=50, top_p=0.9
    )  # 50: what transformers takes by itself
    assert settings.notes == ()


def test_what_polarjax_does_not_have_is_named():
    settings = GenerationSettings.from_json(QWEN | {"tempratur": 3, "min_length": 0, "num_beams": 4})
    assert settings.sampler == pj.Categorical(0.7, top_k=20, top_p=0.8)
    (note,) = settings.notes
    assert note.endswith("ignored: tempratur 3, num_beams 4")
    assert settings.repetition_penalty == 1.05


@pytest.mark.parametrize(
    ("data", "sampler"),
    [
        ({}, pj.Greedy()),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, pj.Greedy()),
        ({"temperature": 0.9}, pj.Greedy()),
        ({"do_sample": None, "top_k": 3}, pj.Greedy()),
        ({"do_sample": True}, pj.Categorical(top_k=50)),
        ({"do_sample": True, "top_k": 0}, pj.Categorical()),
        (
            {"do_sample": True, "top_k": 7, "top_p": 1.0, "temperature": 1},
            pj.Categorical(1, top_k=7, top_p=1.0),
        ),
    ],
)
def test_samplers(data, sampler):
    assert GenerationSettings.from_json(data).sampler == sampler


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 9], (7, 9)), ([], ()), (None, ())])
def test_stop_ids(eos, ids):
    assert GenerationSettings.from_json({"eos_token_id": eos}).stop_ids == ids


@pytest.mark.parametrize(("strings", "kept"), [("END", ("END",)), (["a", "b"], ("a", "b")), (None, ())])
def test_stop_strings(strings, kept):
    assert GenerationSettings.from_json({"stop_strings": strings}).stop_strings == kept


FAULT_23 = {
    "negative temperature": ({"do_sample": True, "temperature": -1}, "temperature.*got -1"),
    "temperature 0": ({"do_sample": True, "temperature": 0.0}, "temperature.*got 0.0"),
    "temperature NaN": ({"do_sample": True, "temperature": float("nan")}, "temperature.*got nan"),
    "temperature as text": ({"temperature": "0.7"}, "temperature.*got '0.7'"),
    "temperature as a long text": ({"temperature": "7" * 999}, "temperature.*got '7{79}, expected"),
    "top_p above 1": ({"do_sample": True, "top_p": 1.5}, "top_p.*got 1.5"),
    "top_p 0": ({"do_sample": True, "top_p": 0.0}, "top_p.*got 0.0"),
    "negative top_k": ({"do_sample": True, "top_k": -1}, "top_k.*got -1"),
    "half a top_k": ({"do_sample": True, "top_k": 1.5}, "top_k.*got 1.5"),
    "a top_k of 0.0": ({"do_sample": True, "top_k": 0.0}, "top_k.*got 0.0"),
    "do_sample as text": ({"do_sample": "yes"}, "do_sample.*got 'yes'"),
    "a stop id as text": ({"eos_token_id": "</s>"}, "eos_token_id.*got '</s>'"),
    "a stop id below 0": ({"eos_token_id": [2, -1]}, "eos_token_id.*got -1"),
    "a stop id that is true": ({"eos_token_id": True}, "eos_token_id.*got True"),
    "a stop id beyond int32": ({"eos_token_id": 3_000_000_000}, "eos_token_id.*got 3000000000.*2147483647"),
    "an empty stop string": ({"stop_strings": ["a", ""]}, "stop_strings.*got ''"),
    "a stop string that is a number": ({"stop_strings": 3}, "stop_strings.*got 3"),
    "no penalty": ({"repetition_penalty": 0}, "repetition_penalty.*got 0"),
    "a penalty that is no number": ({"repetition_penalty": "1"}, "repetition_penalty.*got '1'"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens.*got 0"),
}


@pytest.mark.parametrize("case", FAULT_23)
def test_fault_23_bad_values_are_refused_with_the_file(tmp_path, case):
    data, named = FAULT_23[case]
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    with refuses(pj.CheckpointError, f"generation_config.json: .*{named}"):
        GenerationSettings.read(tmp_path)


@pytest.mark.parametrize("text", ["[", "[]", "\udcff", "{" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with refuses(pj.CheckpointError, "generation_config.json"):
        GenerationSettings.read(tmp_path)


def test_eos_token_is_the_default_stop_id(tmp_path):
    assert GenerationSettings.read(tmp_path).stop_ids == ()
    assert GenerationSettings.read(tmp_path, eos_id=5).stop_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true}')
    assert GenerationSettings.read(tmp_path, eos_id=5).stop_ids == (5,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert GenerationSettings.read(tmp_path, eos_id=5).stop_ids == (1, 2)


def test_flags_go_before_the_file():
    llama = GenerationSettings.from_json(LLAMA_3)
    assert llama.with_flags() == llama
    assert llama.with_flags(greedy=True).sampler == pj.Greedy()
    assert llama.with_flags(temperature=2.0).sampler == pj.Categorical(2.0, top_k=50, top_p=0.9)
    assert llama.with_flags(repetition_penalty=2.0, greedy=True).repetition_penalty == 2.0
    assert GenerationSettings().with_flags(repetition_penalty=2.0).sampler == pj.Greedy()
    assert llama.with_flags(top_k=0).sampler == pj.Categorical(0.6, top_p=0.9)
    assert GenerationSettings().with_flags(top_p=0.5).sampler == pj.Categorical(top_p=0.5)
    with refuses(pj.InputError, "greedy and sampling contradict each other; got temperature"):
        llama.with_flags(greedy=True, temperature=1.0)
    with pytest.raises(pj.InputError, match="temperature"):
        llama.with_flags(temperature=0.0)
    for wrong in (False, 0.0):
        with pytest.raises(pj.InputError, match=f"top_k is out of range; got {wrong}"):
            llama.with_flags(top_k=wrong)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"stop_ids": (-1,)}, "stop_ids is not usable; got -1, expected token ids, 0 to 2147483647"),
        ({"stop_ids": (2**31,)}, "stop_ids is not usable; got 2147483648"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is not usable; got 0.0"),
        ({"repetition_penalty": None}, "repetition_penalty is not usable; got None"),
        ({"max_new_tokens": np.float32(3)}, "max_new_tokens is not usable; got 3.0"),
        ({"stop_strings": ("",)}, "stop_strings is not usable; got ''"),
    ],
)
def test_bad_arguments_are_refused_without_blaming_a_file(values, named):
    with refuses(pj.InputError, f"^GenerationSettings: {named}"):
        dataclasses.replace(GenerationSettings(), **values)


def test_a_bad_flag_is_refused_without_blaming_the_file(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(LLAMA_3))
    with refuses(pj.InputError, "^GenerationSettings: repetition_penalty is not usable; got 0"):
        GenerationSettings.read(tmp_path).with_flags(repetition_penalty=0)


def test_numbers_of_numpy_are_numbers():
    flags = {"temperature": np.float32(0.5), "top_k": np.int64(3), "repetition_penalty": np.float16(2)}
    made = GenerationSettings(stop_ids=(np.int32(5),), max_new_tokens=np.int64(7)).with_flags(**flags)
    expected = GenerationSettings(
        stop_ids=(5,), do_sample=True, temperature=0.5, top_k=3, repetition_penalty=2.0, max_new_tokens=7
    )
    assert made == expected
    assert json.loads(json.dumps(made.to_json())) == expected.to_json()


VALUES = st.none() | st.booleans() | st.integers(-2, 60) | st.floats(-1, 2) | st.text(max_size=2)
KEYS = st.sampled_from(
    ["eos_token_id", "do_sample", "temperature", "top_k", "top_p", "stop_strings", "max_new_tokens", "min_p"]
)


@given(st.dictionaries(KEYS, VALUES | st.lists(VALUES, max_size=2)))
def test_any_values_are_read_or_refused(data):
    try:
        settings = GenerationSettings.from_json(data)
    except pj.InputError as error:
        assert "\n" not in str(error)
        return
    hash(settings.sampler)
    again = GenerationSettings.from_json(settings.to_json())
    assert (again.sampler, again.stop_ids, again.stop_strings) == (
        settings.sampler,
        settings.stop_ids,
        settings.stop_strings,
    )


@pytest.mark.parametrize("data", [LLAMA_3, QWEN])
def test_transformers_reads_the_same(data):
    reference = transformers.GenerationConfig.from_dict(data)
    settings = GenerationSettings.from_json(data)
    assert list(settings.stop_ids) == reference.eos_token_id
    assert (settings.temperature, settings.top_p) == (reference.temperature, reference.top_p)
