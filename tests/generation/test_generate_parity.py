"""Whole generations against transformers' own `generate`: stop ids out of the settings, repetition penalty."""

import numpy as np
import pytest
import torch
import transformers

import polarjax as pj
from polarjax.generation.settings import GenerationSettings
from tests.model.test_hf_parity import both

LENGTHS = (9, 4)
NEW = 24


def _theirs(model: torch.nn.Module, prompt: np.ndarray, **settings) -> list[int]:
    config = transformers.GenerationConfig(**settings, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        made = model.generate(torch.from_numpy(prompt[None]).long(), generation_config=config)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_is_that_of_transformers(penalty):
    theirs, ours = both("llama3-gqa")
    rng = np.random.default_rng(3)
    prompts = rng.integers(3, ours.config.vocab_size, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    free = _theirs(theirs, prompts[0], repetition_penalty=penalty, eos_token_id=None)
    plain = _theirs(theirs, prompts[0], eos_token_id=None)
    assert (plain == free) == (penalty == 1.0)
    asked = {"repetition_penalty": penalty, "eos_token_id": [free[5], free[11]]}
    settings = GenerationSettings.from_json(asked)
    options = {
        "max_new_tokens": NEW,
        "stop_ids": settings.stop_ids,
        "sampler": settings.sampler,
        "repetition_penalty": settings.repetition_penalty,
    }
    made = pj.generate(ours, prompts, np.array(LENGTHS), **options)
    expected = [
        _theirs(theirs, prompt[:length], **asked) for prompt, length in zip(prompts, LENGTHS, strict=True)
    ]
    rows = [row[:n] for row, n in zip(made.tokens.tolist(), made.lengths.tolist(), strict=True)]
    assert rows == expected
    assert len(rows[0]) <= 6
    streamed = [[], []]
    for piece in pj.stream(ours, prompts, np.array(LENGTHS), **options):
        for row, new, n in zip(streamed, piece.tokens.tolist(), piece.lengths, strict=True):
            row += new[:n]
    assert streamed == expected


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_penalties(penalty):
    _, ours = both("llama3-gqa")
    prompt = np.full((1, 4), 5, np.int32), np.array([4])
    for call in (pj.generate, pj.stream):
        with pytest.raises(pj.InputError, match="repetition_penalty: unusable"):
            call(ours, *prompt, max_new_tokens=2, repetition_penalty=penalty)
