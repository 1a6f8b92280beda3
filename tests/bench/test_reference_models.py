"""The bundled models: HF folders that torch reads alike, with a tokenizer that loses nothing, that have learnt."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import polarjax as pj
from checkpoints_convert import convert_checkpoint
from polarjax.demo.healed import STEPS, healed, pack
from polarjax.model.parameters import parameters
from polarjax.selection.routers import Routers
from polarjax.text.corpus import standard_library_text
from polarjax.text.token_windows import token_stream, windows
from tests.model import zoo
from tests.tolerances import OWN_ERRORS

ASSETS = Path(pj.__file__).parent / "assets"
MODELS = ("opt-6m", "llama-6m")
MEGABYTE = 1_000_000


@pytest.mark.parametrize("name", MODELS)
def test_size_and_dtype(name: str):
    weights = ASSETS / name / "model.safetensors"
    assert weights.stat().st_size <= 12 * MEGABYTE
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name)
    assert model.dtype == torch.bfloat16


def test_all_assets_together_are_small():
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) <= 24 * MEGABYTE


def test_what_healing_changed_comes_back_from_its_file(tmp_path: Path):
    """Output projections to half a step, biases and routers exactly."""
    plain, key = zoo.model("opt", "bfloat16"), jax.random.key(0)
    layers = zoo.routers("opt", "bfloat16").layers
    mean = jax.random.normal(key, (plain.config.num_kv_heads, plain.config.d_model), jnp.bfloat16)
    routers = Routers(tuple(dataclasses.replace(layer, mean=mean) for layer in layers))
    tuned = zoo.with_parameter(plain, "layers.1.attn.wo", plain.layers[1].attn.wo[...] * 1.5)
    tuned = zoo.with_parameter(tuned, "layers.0.attn.bo", plain.layers[0].attn.bo[...] + 1)
    np.savez_compressed(tmp_path / "healed.npz", **pack(tuned, routers))
    found, learned = healed(plain, tmp_path / "healed.npz")
    wanted, got = (
        {name: np.asarray(value, np.float64) for name, value in parameters(model).items()}
        for model in (tuned, found)
    )
    for name, value in wanted.items():
        step = value.std((1, 2, 3), keepdims=True) / STEPS if name.endswith("attn.wo") else 0
        rounding = 2**-8 * np.abs(value) if name.endswith("attn.wo") else 0
        assert np.all(np.abs(got[name] - value) <= 0.51 * step + rounding), name
    for name in ("w_group", "b_group", "mean"):
        for mine, theirs in zip(learned.layers, routers.layers, strict=True):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_opens_with_bos_and_returns_every_text(name: str):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    text = "def f(x):\n\tif  x:\n        return {'a': 1}   \n\n\n# Grüße, 日本 \r\n <pad> isn't .  , \x00\x7f"
    ids = tokenizer(text).input_ids
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 1)
    assert ids[0] == 1
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids) < len(tokenizer) == 4096


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_as_torch_and_learnt(name: str, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    text = standard_library_text("evaluation")[:60_000]
    stream = token_stream(text, lambda each: tokenizer.backend_tokenizer.encode(each).ids[1:], separator=None)
    rows = windows(stream, 256, first=tokenizer.bos_token_id)[:2]
    exact, theirs = (torch_logits(name, rows, dtype) for dtype in (torch.float64, torch.float32))

    convert_checkpoint(ASSETS / name, tmp_path / "model")
    model = pj.load(tmp_path / "model", dtype="float32").model
    lengths = jnp.full(len(rows), rows.shape[1], jnp.int32)
    ours = np.asarray(jax.jit(pj.forward)(model, jnp.asarray(rows), lengths)[0])

    # logits reach 30, where float32 itself errs by about 1e-4, differently on each processor: torch's own error is
    # the measure, and the mean of its square is steadier than the largest of four million
    assert rms(ours - exact) <= OWN_ERRORS * rms(theirs - exact)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
    scores = ours - np.log(np.exp(ours).sum(-1, keepdims=True))
    picked = np.take_along_axis(scores[:, :-1], rows[:, 1:, None], -1)
    assert math.exp(-picked.mean()) < 30  # measured on all of it: 9.8 (OPT); a unigram model is above 1,000


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def torch_logits(name: str, rows: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=dtype).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(rows.astype(np.int64))).logits.numpy()
