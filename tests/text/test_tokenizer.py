"""Text to right-padded batches and back."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

import polarjax as pj
from polarjax.text.tokenizer import Tokenizer, has_tokenizer

FOLDER = Path(pj.__file__).parent / "assets" / "opt-6m"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FOLDER)


def test_a_ragged_batch(tokenizer):
    texts = ["def f(x):\n    return x", "a", "Grüße, 日本"]
    tokens, lengths = tokenizer.encode(texts)
    assert tokens.dtype == lengths.dtype == np.int32
    assert tokens.shape == (3, lengths.max())
    for row, length in zip(tokens, lengths, strict=True):
        assert row[0] == tokenizer.bos_id
        assert (row[length:] == tokenizer.pad_id).all()
    assert tokenizer.decode(tokens, lengths) == texts
    assert tokenizer.decode(tokens) == texts


def test_special_tokens_are_optional(tokenizer):
    with_special, without = (
        tokenizer.encode(["x = 1"])[0],
        tokenizer.encode(["x = 1"], add_special_tokens=False)[0],
    )
    np.testing.assert_array_equal(with_special[:, 1:], without)
    shown = tokenizer.decode(with_special, skip_special_tokens=False)[0]
    assert shown.endswith("x = 1")
    assert shown != "x = 1"


@pytest.mark.parametrize("texts", [[], "a text", ["a", ""]])
def test_refused_texts(tokenizer, texts):
    with pytest.raises(pj.InputError):
        tokenizer.encode(texts, add_special_tokens=False)


def test_ids(tokenizer):
    assert tokenizer.vocab_size == 4096
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


@pytest.mark.parametrize(("eos", "expected"), [(7, (7,)), ([7, 9], (7, 9)), ([], ()), (None, (1,))])
def test_stop_ids_come_from_the_generation_config(tmp_path, eos, expected):
    folder = shutil.copytree(FOLDER, tmp_path / "t")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert Tokenizer.load(folder).stop_ids == expected


def test_missing_tokenizer(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(pj.CheckpointError, match="no tokenizer; expected one of"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [("tokenizer.json", "{"), ("generation_config.json", "["), ("generation_config.json", "[]")],
)
def test_damaged_files(tmp_path, file, text):
    folder = shutil.copytree(FOLDER, tmp_path / "t")
    (folder / file).write_text(text)
    with pytest.raises(pj.CheckpointError) as error:
        Tokenizer.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [["rag"], ["rag", "tool_use"], ["rag", "default"]])
def test_named_chat_templates(tmp_path, names):
    folder = shutil.copytree(FOLDER, tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": "{{ messages[0].content }}"} for name in names]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(folder)
    messages = [{"role": "user", "content": "hello"}]
    if "default" in names:
        assert loaded.encode_chat(messages)
    else:
        with pytest.raises(pj.InputError, match=f"none named default; got {', '.join(names)}"):
            loaded.encode_chat(messages)


def test_transformers_prints_nothing(tmp_path, monkeypatch, caplog):
    """How long a chat may be is the model's to say; LLaMA 3.1 asks for spaces to be cleaned up, which BPE forbids."""
    folder = shutil.copytree(FOLDER, tmp_path / "t")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["clean_up_tokenization_spaces"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(folder)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", "transformers"):
        assert len(loaded.encode_chat([{"role": "user", "content": "a b " * 600}])) > 512
        assert loaded.decode(loaded.encode(["a , b ."])[0]) == ["a , b ."]
    assert not caplog.records


def test_code_in_the_folder_is_not_run(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    Tokenizer.load(folder).encode(["a"])
    assert not (tmp_path / "ran").exists()
