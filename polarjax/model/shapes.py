"""Name, logical axes and sizes of a decoder's parameters, computed from the configuration without JAX.

The layers make their parameters from these tables.
"""

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from polarjax.configs import ModelConfig

type Axes = dict[str, int]
"""Logical name and size of each axis, in order."""


def norm(config: ModelConfig, width: int, *, axis: str = "embed", kind: str | None = None) -> dict[str, Axes]:
    """Scale and bias of a norm over `width`; one with an explicit `kind` has no bias."""
    biased = config.norm_bias and kind is None
    return {name: {axis: width} for name in (["bias"] if biased else []) + ["scale"]}


def embedding(config: ModelConfig) -> dict[str, Axes]:
    """Token table, learned positions, and projections if the table is narrower than the model."""
    table, wide = _table(config), {"embed": config.d_model}
    axes = {}
    if config.positions == "learned":
        axes["positions"] = {"positions": config.max_positions + config.position_offset} | wide
    if config.embed_dim is not None:
        axes |= {"project_in": table | wide, "project_out": wide | table}
    return axes | {"tokens": {"vocab": config.vocab_size} | table}


def head(config: ModelConfig) -> dict[str, Axes]:
    """The output projection of an untied model."""
    return {"w": {"vocab": config.vocab_size} | _table(config)}


def attention(config: ModelConfig) -> dict[str, Axes]:
    """Projections of queries, keys, values and the output, and their biases, without `q_norm` and `k_norm`."""
    wide, kv = {"embed": config.d_model}, {"groups": config.num_kv_heads, "head": config.head_dim}
    q = {"groups": config.num_kv_heads, "queries": config.q_per_group, "head": config.head_dim}
    axes = {"bk": kv} if config.qkv_bias else {}
    axes |= {"bo": wide} if config.out_bias else {}
    axes |= {"bq": q, "bv": kv} if config.qkv_bias else {}
    return axes | {"wk": wide | kv, "wo": q | wide, "wq": wide | q, "wv": wide | kv}


def mlp(config: ModelConfig) -> dict[str, Axes]:
    """Neuron-major weights and biases, including the gate's if there is one."""
    wide, neurons = {"embed": config.d_model}, {"neurons": config.d_ff}
    names = ("down", "gate", "up") if config.gated_mlp else ("down", "up")
    biases = {f"b_{name}": wide if name == "down" else neurons for name in names}
    return (biases if config.mlp_bias else {}) | {f"w_{name}": neurons | wide for name in names}


@functools.cache
def shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Every parameter's shape, keyed by dotted path (`layers.0.attn.wq`), in the order of `parameters`."""
    return MappingProxyType({name: tuple(axes.values()) for name, axes in _all(config)})


def _all(config: ModelConfig) -> Iterator[tuple[str, Axes]]:
    yield from _under("embed", embedding(config))
    if config.final_norm:
        yield from _under("final_norm", norm(config, config.d_model))
    if not config.tie_embeddings:
        yield from _under("head", head(config))
    layer = dict(_layer(config))
    for i in range(config.num_layers):
        yield from _under(f"layers.{i}", layer)


def _layer(config: ModelConfig) -> Iterator[tuple[str, Axes]]:
    head_norm = norm(config, config.head_dim, axis="head", kind="rms") if config.qk_norm else {}
    attn = attention(config) | dict(_under("k_norm", head_norm)) | dict(_under("q_norm", head_norm))
    yield from _under("attn", dict(sorted(attn.items())))
    yield from _under("attn_norm", norm(config, config.d_model))
    yield from _under("mlp", mlp(config))
    yield from _under("mlp_norm", norm(config, config.d_model))


def _under(block: str, axes: Mapping[str, Axes]) -> Iterator[tuple[str, Axes]]:
    yield from ((f"{block}.{name}", each) for name, each in axes.items())


def _table(config: ModelConfig) -> Axes:
    """The token table's width axis: the model's, or a narrower one."""
    return {"embed": config.d_model} if config.embed_dim is None else {"table": config.embed_dim}
