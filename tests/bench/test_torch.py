"""The dense step in PyTorch that ours is compared with computes the same model."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import polarjax as pj  # noqa: E402
from bench import bench_torch  # noqa: E402
from bench.models import SHAPES, TINY_SHAPE  # noqa: E402
from bench.torch_step import TorchStep  # noqa: E402
from polarjax.model.parameters import parameters, with_parameters  # noqa: E402
from tests.model import zoo  # noqa: E402
from tests.tolerances import assert_close  # noqa: E402

CACHE, BATCH = 9, 3


def in_torch(model: pj.Decoder) -> TorchStep:
    """The step with a model's parameters and an empty cache."""
    config = model.config
    step = TorchStep(config, BATCH, CACHE, device="cpu", dtype=torch.float32)
    flat = {name: torch.tensor(np.asarray(value)) for name, value in parameters(model).items()}
    wide = lambda name: flat[name].reshape(flat[name].shape[0], -1)
    for i, layer in enumerate(step.layers):
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        own = {
            "qkv": torch.cat([wide(f"{attn}.w{n}") for n in "qkv"], 1).T,
            "out": flat[f"{attn}.wo"].reshape(-1, config.d_model).T,
            "up": torch.cat([flat[f"{mlp}.{n}"] for n in ("w_gate", "w_up") if f"{mlp}.{n}" in flat]),
            "down": flat[f"{mlp}.w_down"].T,
            "norm_attn": flat[f"layers.{i}.attn_norm.scale"],
            "norm_mlp": flat[f"layers.{i}.mlp_norm.scale"],
        }
        if config.qkv_bias:
            own["qkv_bias"] = torch.cat([flat[f"{attn}.b{n}"].reshape(-1) for n in "qkv"])
        for name, path in {
            "out_bias": f"{attn}.bo",
            "up_bias": f"{mlp}.b_up",
            "down_bias": f"{mlp}.b_down",
            "norm_attn_bias": f"layers.{i}.attn_norm.bias",
            "norm_mlp_bias": f"layers.{i}.mlp_norm.bias",
        }.items():
            if path in flat:
                own[name] = flat[path]
        assert {name: x.shape for name, x in layer.items()} == {name: x.shape for name, x in own.items()}
        layer.update(own)
    step.embed = flat["embed.tokens"]
    step.head = flat.get("head.w", step.embed)
    step.positions = flat.get("embed.positions")
    step.norm, step.norm_bias = flat["final_norm.scale"], flat.get("final_norm.bias", step.norm_bias)
    return step


@pytest.mark.parametrize("name", ["opt", "qkv-bias"])
def test_same_logits(name):
    """The step attends to its whole cache, so the last token of a full one is compared."""
    config = zoo.CONFIGS[name]
    rope = None if config.rope is None else pj.RopeConfig()
    model = with_parameters(dataclasses.replace(config, rope=rope), parameters(zoo.model(name)))
    tokens = np.random.default_rng(0).integers(0, zoo.VOCAB, (BATCH, CACHE), np.int32)
    expected, cache = zoo.prefill(
        model, tokens, np.full(BATCH, CACHE, np.int32), zoo.empty_cache(model, BATCH, 16)
    )
    step = in_torch(model)
    for i, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        step.keys[i], step.values[i] = (torch.tensor(np.asarray(x)[:, :, :CACHE]) for x in (k, v))
        step.keys[i][:, :, -1], step.values[i][:, :, -1] = 0, 0
    with torch.no_grad():
        made = step.logits(torch.tensor(tokens[:, -1]).long(), torch.tensor([CACHE - 1]))
    assert_close(made.numpy(), expected, "rounding")
    assert step.keys[0][:, :, -1].abs().min() > 0


def test_transformers_classes_have_the_same_parameters():
    """One layer of every family, in shape."""
    for shape in (*SHAPES.values(), TINY_SHAPE):
        config = dataclasses.replace(shape.config, num_layers=1)
        theirs = bench_torch.family(dataclasses.replace(shape, config=config), torch.device("meta"))
        assert theirs.dtype == torch.bfloat16
        count = sum(each.numel() for each in {id(p): p for p in theirs.parameters()}.values())
        assert 2 * count == pj.costs.weights_bytes(config)
