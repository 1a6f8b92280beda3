"""Taking over tokenizers: what transformers reads silently wrongly is fixed, the rest left as it is."""

import json
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import transformers
from hypothesis import HealthCheck, given, settings

import polarjax as pj
from polarjax.text import tokenizer, tokenizer_files
from polarjax.text.tokenizer import Tokenizer
from polarjax.text.tokenizer_files import copy_tokenizer
from tests.one_line import refuses
from tests.text import hf_tokenizers as small

TEXTS = ["Hello world, this is it", "x", "日本 é", "def main(x):\n  return 1"]


def _taken(source: Path, target: Path, **changes) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer out of the copy, and what was told; `changes` go into config.json."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    before = _contents(source)
    _, notes = copy_tokenizer(source, target, model_type=config["model_type"], config=config)
    assert _contents(source) == before
    return Tokenizer.load(target, model_type=config["model_type"]), notes


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _ids(loaded: Tokenizer) -> list[list[int]]:
    return [loaded.hf.encode(text) for text in TEXTS]


def _transformers(source: Path) -> list[list[int]]:
    """What transformers makes of the folder."""
    hf = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    return [hf.encode(text) for text in TEXTS]


def test_hub_opt_folder_needs_no_changes(tmp_path):
    source = small.write_opt(tmp_path / "hf", small.OPT_SETTINGS)
    loaded, notes = _taken(source, tmp_path / "out")
    assert notes == ()
    assert _ids(loaded) == _transformers(source)
    assert all(row[0] == 2 for row in _ids(loaded))
    assert (loaded.bos_id, loaded.stop_ids, loaded.pad_id) == (2, (2,), 1)


SILENT_OPT = {
    "no tokenizer_config.json": None,
    "an empty one": {},
    "no add_bos_token": {key: value for key, value in small.OPT_SETTINGS.items() if key != "add_bos_token"},
    "nothing but add_bos_token": {"add_bos_token": True},
    "the class alone": {"tokenizer_class": "GPT2Tokenizer"},
}


@pytest.mark.parametrize("case", SILENT_OPT)
def test_opt_folder_without_settings_is_completed(tmp_path, case):
    right = small.write_opt(tmp_path / "right", small.OPT_SETTINGS)
    source = small.write_opt(tmp_path / "hf", SILENT_OPT[case])
    expected = _transformers(right)
    assert _transformers(source) != expected  # silently
    loaded, notes = _taken(source, tmp_path / "out")
    assert _ids(loaded) == expected
    assert (loaded.bos_id, loaded.stop_ids, loaded.pad_id) == (2, (2,), 1)
    assert loaded.vocab_size == len(transformers.AutoTokenizer.from_pretrained(right))
    (note,) = notes
    assert "fixed for opt" in note
    assert "\n" not in note


@pytest.mark.parametrize("name", ["opt-6m", "llama-6m"])
def test_the_bundled_models_are_taken_as_they_are(tmp_path, name):
    source = Path(shutil.copytree(Path(pj.__file__).parent / "assets" / name, tmp_path / "hf"))
    loaded, notes = _taken(source, tmp_path / "out")
    assert notes == ()
    assert _ids(loaded) == _transformers(source)


def test_opt_tokens_named_only_in_special_tokens_map(tmp_path):
    source = small.write_opt(tmp_path / "hf")
    names = {key: small.OPT_SETTINGS[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (source / "special_tokens_map.json").write_text(json.dumps(names))
    loaded, notes = _taken(source, tmp_path / "out")
    assert all(row[0] == 2 for row in _ids(loaded))
    assert notes == (
        "tokenizer fixed for opt, because tokenizer_config.json does not say: texts begin with </s>",
    )


@pytest.mark.parametrize("model_type", ["llama", "sparsellama", "ministral"])
@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer"}], ids=["bare", "class"])
def test_bare_sentencepiece_model_is_completed(tmp_path, settings, model_type):
    right = small.write_sentencepiece(tmp_path / "right", small.LLAMA_SETTINGS)
    source = small.write_sentencepiece(tmp_path / "hf", settings)
    expected = _transformers(right)
    assert all(row[0] == 1 for row in expected)
    assert _transformers(source) != expected
    loaded, notes = _taken(source, tmp_path / "out", model_type=model_type)
    assert _ids(loaded) == expected
    assert [loaded.hf.decode(row, skip_special_tokens=True) for row in expected] == TEXTS
    assert (loaded.bos_id, loaded.stop_ids) == (1, (2,))
    (note,) = notes
    assert "add_bos_token True, bos_token <s>, eos_token </s>" in note


@pytest.mark.parametrize("model_type", ["llama", "sparsellama", "mistral"])
def test_sentencepiece_model_becomes_tokenizer_json(tmp_path, model_type):
    """So that the model directory is read without the extra, and for Mistral as transformers reads LLaMA."""
    source = small.write_sentencepiece(tmp_path / "hf", small.LLAMA_SETTINGS)
    expected = _transformers(source)
    loaded, notes = _taken(source, tmp_path / "out", model_type=model_type)
    assert (_ids(loaded), notes) == (expected, ())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_completed_sentencepiece_model_matches_sentencepiece(tmp_path):
    import sentencepiece

    source = small.write_sentencepiece(tmp_path / "hf")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    loaded, _ = _taken(source, tmp_path / "out")
    assert [row[1:] for row in _ids(loaded)] == [reference.encode(text) for text in TEXTS]


def test_without_sentencepiece_loading_names_the_package(tmp_path, monkeypatch):
    source = small.write_sentencepiece(tmp_path / "hf")
    expected = _transformers(small.write_sentencepiece(tmp_path / "right", small.LLAMA_SETTINGS))
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        for module in (tokenizer, tokenizer_files):
            patch.setattr(module, "can_read_sentencepiece", lambda: False)
        _, notes = copy_tokenizer(source, tmp_path / "out", model_type="llama", config=small.CONFIGS["llama"])
        assert "polarjax[sentencepiece]" in notes[0]
        with refuses(pj.CheckpointError, r"needs the libraries sentencepiece and protobuf.*polarjax\["):
            Tokenizer.load(tmp_path / "out")
    assert _ids(Tokenizer.load(tmp_path / "out", model_type="llama")) == expected


def test_llama_tokenizer_without_settings_gets_special_tokens(tmp_path):
    source = small.write_llama(tmp_path / "hf")
    loaded, notes = _taken(source, tmp_path / "out")
    assert _ids(loaded) == _transformers(source)
    assert (loaded.bos_id, loaded.stop_ids) == (1, (2,))
    assert notes == (
        "tokenizer fixed for llama, because tokenizer_config.json does not say: bos_token <s>, eos_token </s>",
    )


@pytest.mark.parametrize(
    ("settings", "bos"),
    [
        (None, True),
        (small.LLAMA_SETTINGS, True),
        (small.LLAMA_SETTINGS | {"add_bos_token": False}, False),
        ({key: value for key, value in small.LLAMA_SETTINGS.items() if key != "add_bos_token"}, False),
    ],
    ids=["no settings", "asks for it", "refuses it", "known class, silent"],
)
def test_a_llama_tokenizer_json_without_bos(tmp_path, settings, bos):
    """What the settings say goes; without any, a LLaMA text begins with <s>."""
    source = small.write_llama(tmp_path / "hf", settings, begin=False)
    loaded, _ = _taken(source, tmp_path / "out")
    assert [row[0] == 1 for row in _ids(loaded)] == [bos] * len(TEXTS)
    plain = [row[1:] if bos else row for row in _ids(loaded)]
    assert plain == _transformers(source)


def test_a_llama_3_tokenizer_keeps_its_own_beginning(tmp_path):
    made = small.byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], begin="<|begin_of_text|>")
    source = small.write_json_tokenizer(tmp_path / "hf", "llama", made)
    loaded, _ = _taken(source, tmp_path / "out", bos_token_id=0, eos_token_id=[1, 2])
    assert _ids(loaded) == _transformers(source)
    assert (loaded.bos_id, loaded.eos_id, loaded.stop_ids) == (0, 1, (1, 2))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_families_and_tokenizers_without_bos_get_none(tmp_path, model_type):
    source = small.write_json_tokenizer(
        tmp_path / "hf", "llama", small.byte_level(["<|im_start|>", "<|im_end|>"])
    )
    loaded, _ = _taken(source, tmp_path / "out", model_type=model_type, bos_token_id=0, eos_token_id=1)
    assert _ids(loaded) == _transformers(source)
    assert all(row[0] > 1 for row in _ids(loaded))
    assert loaded.stop_ids == (1,)


def test_opt_shaped_model_with_another_tokenizer_gets_no_bos(tmp_path):
    """As Galactica is: its tokenizer.json adds nothing, and its settings name another class."""
    made = small.byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    source = small.write_json_tokenizer(tmp_path / "hf", "opt", made)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    loaded, _ = _taken(source, tmp_path / "out", bos_token_id=0)
    assert _ids(loaded) == _transformers(source)
    assert (loaded.bos_id, loaded.stop_ids) == (None, (2,))


def test_ids_beyond_the_model_are_reported(tmp_path):
    source = small.write_opt(tmp_path / "hf", small.OPT_SETTINGS)
    loaded, notes = _taken(source, tmp_path / "out", vocab_size=300)
    count = loaded.vocab_size
    assert count > 300
    assert notes == (f"the tokenizer has {count} ids, the model 300: text with ids beyond is refused",)


def test_remote_code_is_named_and_never_run(tmp_path):
    ran = tmp_path / "ran"
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    source = small.write_llama(tmp_path / "hf", settings)
    (source / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    with refuses(pj.CheckpointError, r"hf: .*its own code \(auto_map\), which polarjax never runs"):
        _taken(source, tmp_path / "out")
    known = small.write_llama(tmp_path / "known", settings | {"tokenizer_class": "LlamaTokenizer"})
    (known / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    loaded, notes = _taken(known, tmp_path / "copy")
    assert "asks for its own code (auto_map), which is never run" in notes[0]
    assert all(row[0] == 1 for row in _ids(loaded))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("tokenizer.json", '{"model": 1}', "hf: unreadable tokenizer; got no 'added_tokens'"),
        ("tokenizer.json", "[]", "hf/tokenizer.json: not a JSON object"),
        ("tokenizer_config.json", "{", "hf/tokenizer_config.json: not readable as JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "hf/generation_config.json: eos_token_id"),
        (
            "tokenizer_config.json",
            '{"add_bos_token": "true"}',
            "hf/tokenizer_config.json: add_bos_token.*Hint: write true",
        ),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""}',
            "special tokens that are empty.*bos_token ''.*remove those that are empty",
        ),
    ],
)
def test_damaged_files_are_named_in_the_source(tmp_path, file, text, named):
    source = small.write_llama(tmp_path / "hf")
    (source / file).write_text(text)
    with refuses(pj.CheckpointError, named):
        _taken(source, tmp_path / "out")


@pytest.mark.parametrize("eos", [-1, "x", [2, -1]])
def test_a_bad_stop_id_is_named_where_it_stands(tmp_path, eos):
    source = small.write_llama(tmp_path / "hf")
    with refuses(pj.CheckpointError, "hf/config.json: eos_token_id is not usable"):
        _taken(source, tmp_path / "out", eos_token_id=eos)


def test_null_is_the_same_as_leaving_a_key_out(tmp_path):
    source = small.write_llama(tmp_path / "hf", small.LLAMA_SETTINGS | {"add_bos_token": None})
    (source / "generation_config.json").write_text('{"eos_token_id": null, "max_length": 4096}')
    loaded, notes = _taken(source, tmp_path / "out")
    assert loaded.stop_ids == (2,)
    assert [row[0] for row in _ids(loaded)] == [1] * len(TEXTS)
    assert notes == ("generation_config.json has unsupported entries; ignored: max_length 4096",)


def test_sampling_settings_of_an_old_config_json_are_kept(tmp_path):
    source = small.write_opt(tmp_path / "hf", small.OPT_SETTINGS)
    loaded, _ = _taken(source, tmp_path / "out", do_sample=True, temperature=0.7, top_k=9)
    assert loaded.generation.sampler == pj.Categorical(0.7, top_k=9)


ODD = st.sampled_from(
    [None, True, 0, 1, -1, 2**70, 1.5, "", "</s>", "\ud800", [], [[]], [1], {}, {"content": 3}]
)
KEYS = {
    "tokenizer_config.json": [
        "tokenizer_class",
        "bos_token",
        "eos_token",
        "add_bos_token",
        "auto_map",
        "unk_token",
    ],
    "special_tokens_map.json": ["bos_token", "eos_token", "pad_token"],
    "config.json": ["bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class", "vocab_size"],
    "generation_config.json": ["eos_token_id", "top_k", "do_sample"],
    "tokenizer.json": ["added_tokens", "model", "post_processor", "normalizer"],
}
CHANGES = st.sampled_from(sorted(KEYS)).flatmap(
    lambda file: st.tuples(st.just(file), st.sampled_from(KEYS[file]), ODD)
)


@pytest.mark.parametrize("kind", ["opt", "llama"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_mutated_files_are_read_or_refused(kind, changes):
    """Whatever the files say, only our own error comes out, in one line."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch, "hf"), Path(scratch, "out")
        target.mkdir()
        small.write_opt(source, {}) if kind == "opt" else small.write_llama(source, {})
        for file, key, value in changes:
            if file != "tokenizer.json" or kind == "llama":
                path = source / file
                before = json.loads(path.read_text()) if path.is_file() else {}
                path.write_text(json.dumps(before | {key: value}))
        config = json.loads((source / "config.json").read_text())
        try:
            copy_tokenizer(source, target, model_type=kind, config=config)
            Tokenizer.load(target, model_type=kind)
        except pj.PolarjaxError as error:
            assert "\n" not in str(error)
