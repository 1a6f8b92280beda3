"""Feeds spoilt checkpoints to the converter: nothing but polarjax's own errors may come out, one line each.

    python -m tests.convert.fuzz --seconds 60 --seed 7

changes bytes of the files, and, knowing their structure, values of headers, indexes and configs. What is still accepted
must be readable in full. The seed is printed with a finding, so that it can be had again.
"""

import argparse
import copy
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.convert import parameter_dtype
from checkpoints_convert.hf_config import CONFIG, read_config
from checkpoints_convert.rules import expected_tensors, letter_sizes, make_plan
from checkpoints_convert.weights_io import INDEX, open_weights
from polarjax.errors import PolarjaxError

CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "model_type": "opt",
        "vocab_size": 7,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "ffn_dim": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 5,
        "word_embed_proj_dim": 2,
        "do_layer_norm_before": False,
    },
    {
        "model_type": "qwen3",
        "vocab_size": 7,
        "hidden_size": 4,
        "intermediate_size": 3,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "layer_types": ["full_attention", "sliding_attention"],
        "use_sliding_window": True,
        "sliding_window": 3,
    },
)
ODD = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, float("nan"), float("inf"), "", "x",
    "F32", "I8", "../x", "model-1.safetensors", "\x00", "\ud800", "9" * 300, [], [0], [[]], [1, 2], {}, {"a": 1},
)  # fmt: skip


def spoil(value: Any, draw: random.Random) -> Any:
    """The value with one thing in it changed, removed or added, at any depth."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        changed = dict(value)
        key = draw.choice(list(changed))
        match draw.randrange(5):
            case 0:
                del changed[key]
            case 1:
                changed[
                    draw.choice(
                        (
                            "x",
                            "rope_type",
                            "quantization_config",
                            "transformers_weights",
                            "lm_head.weight",
                            "",
                        )
                    )
                ] = draw.choice(ODD)
            case 2:
                changed[key] = changed[draw.choice(list(changed))]
            case _:
                changed[key] = spoil(changed[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], spoil(value[at], draw), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice((-8, -4, -1, 1, 4, 8))
    return draw.choice(ODD)


def scramble(data: bytes, draw: random.Random) -> bytes:
    """The bytes with some changed, and perhaps cut or drawn out."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    end = draw.choice((None, None, None, draw.randrange(len(changed))))
    return bytes(changed[:end]) + bytes(draw.choice((0, 0, 0, 3)))


class Checkpoint:
    """A tiny checkpoint in two shards, whose files can be written whole or spoilt."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        family, parsed, *_ = read_config(config)
        sizes = letter_sizes(parsed)
        steps = expected_tensors(family, parsed).values()
        shapes = {step.source: list(step.layout.source_shape(sizes)) for step in steps}
        names = sorted(shapes)
        self.shards = {
            f"model-{i}.safetensors": self._header(shapes, names[i::2]) for i in range(2) if names[i::2]
        }
        self.index = {
            "weight_map": {name: f"model-{i}.safetensors" for i in range(2) for name in names[i::2]}
        }

    @staticmethod
    def _header(shapes: dict[str, list[int]], names: list[str]) -> dict[str, Any]:
        header, end = {}, 0
        for name in names:
            start, end = end, end + 4 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
        return header

    def write(self, folder: Path, draw: random.Random) -> None:
        """Writes all files, one or two of them spoilt."""
        spoilt = draw.sample([CONFIG, INDEX, *self.shards], draw.randrange(1, 3))
        whole = {CONFIG: self.config, INDEX: self.index, **self.shards}
        for name, content in whole.items():
            body = max(each["data_offsets"][1] for each in content.values()) if name in self.shards else None
            if name in spoilt and draw.random() < 0.7:
                content = spoil(copy.deepcopy(content), draw)
            data = json.dumps(content).encode()
            if body is not None:
                data = len(data).to_bytes(8, "little") + data + bytes(body)
            (folder / name).write_bytes(
                scramble(data, draw) if name in spoilt and draw.random() < 0.4 else data
            )


def attempt(folder: Path) -> str:
    """Reads a checkpoint as the converter does, weights included; "accepted", or the kind of the refusal."""
    try:
        family, config, _, named = read_config(folder)
        tensors = open_weights(folder, named)
        plan = make_plan(family, config, {name: each.shape for name, each in tensors.items()}, where=folder)
        used = [tensors[step.source] for step in plan.steps]
        parameter_dtype(None, used, folder)
        for step in plan.steps:
            tensor = tensors[step.source]
            rows = tensor.read().reshape(tensor.matrix)
            step.layout.place(rows, 0, np.empty(math.prod(step.shape), rows.dtype))
    except PolarjaxError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
        return type(error).__name__
    return "accepted"


def run(seed: int, *, count: int | None = None, seconds: float | None = None) -> Counter[str]:
    """Tries `count` spoilt checkpoints, or as many as fit into `seconds`; how often each outcome came."""
    checkpoints = [Checkpoint(config) for config in CONFIGS]
    outcomes: Counter[str] = Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        number = 0
        while (count is None or number < count) and (seconds is None or time.monotonic() - started < seconds):
            draw = random.Random(f"{seed} {number}")
            folder = Path(place, str(number % len(checkpoints)))
            folder.mkdir(exist_ok=True)
            try:
                checkpoints[number % len(checkpoints)].write(folder, draw)
                outcomes[attempt(folder)] += 1
            except Exception:
                print(f"found with seed {seed}, number {number}", file=sys.stderr)
                raise
            number += 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(dict(run(args.seed, seconds=args.seconds)))


if __name__ == "__main__":
    main()
