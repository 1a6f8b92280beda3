"""A large checkpoint made in seconds: LLaMA in bfloat16 shards, every tensor cut from one block of noise."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checkpoints_convert import config_from_hf
from checkpoints_convert.families import FAMILIES
from checkpoints_convert.rules import expected_tensors, letter_sizes
from checkpoints_convert.weights_io import INDEX

WIDTH, NEURONS, VOCAB = 2048, 8192, 32000
SHARD = 700_000_000


def write(folder: Path, *, layers: int) -> tuple[int, int]:
    """Writes the checkpoint; gives the bytes of all tensors and of the largest."""
    folder.mkdir(parents=True)
    data = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(data))
    config = config_from_hf(data)
    sizes = letter_sizes(config)
    steps = expected_tensors(FAMILIES["llama"], config).values()
    shapes = {step.source: step.layout.source_shape(sizes) for step in steps}
    parts = list(_parts(shapes))
    places = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05}-of-{len(parts):05}.safetensors"
        _write_shard(folder / name, part)
        places |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(map(_num_bytes, shapes.values())), max(map(_num_bytes, shapes.values()))


def _num_bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * 2


def _parts(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    part: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if part and sum(map(_num_bytes, part.values())) + _num_bytes(shape) > SHARD:
            yield part
            part = {}
        part[name] = shape
    yield part


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + _num_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).integers(0x3C00, 0x3F00, 1 << 22, np.uint16)  # finite and positive
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for left in range(end, 0, -noise.nbytes):
            stream.write(noise.view(np.uint8)[:left].data)
