"""A model directory for the tests of verbs that generate text."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np

import polarjax as pj
from polarjax.model.parameters import abstract, parameters, with_parameters
from polarjax.text.tokenizer import Tokenizer
from tests.model import zoo

ASSET = Path(pj.__file__).parent / "assets" / "opt-6m"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def random_model(rng: np.random.Generator) -> pj.Decoder:
    """A tiny model with the vocabulary of `ASSET` and 64 positions."""
    config = dataclasses.replace(zoo.CONFIGS["opt"], vocab_size=4096, max_positions=64)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.2
    return with_parameters(config, {path: draw(leaf) for path, leaf in parameters(abstract(config)).items()})


def make_home(folder: Path) -> Path:
    """A model directory whose tokenizer has a chat template and no generation settings of its own."""
    files = folder / "tokenizer"
    files.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSET / name, files / name)
    (files / "chat_template.jinja").write_text(TEMPLATE)
    pj.save(folder / "model", pj.Bundle(random_model(np.random.default_rng(0)), Tokenizer.load(files)))
    return folder / "model"
