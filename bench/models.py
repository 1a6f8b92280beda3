"""Published models, for measuring whole decoding steps with random weights."""

import bisect
import dataclasses
import math
from typing import Any

import polarjax as pj
from polarjax import costs
from polarjax.model.mesh_shape import ONE_DEVICE, MeshShape

ROOM = 2 * 2**30  # bytes for what is neither weight nor cache

OPT_6_7B = pj.ModelConfig(
    vocab_size=50272,
    num_layers=32,
    d_model=4096,
    d_ff=16384,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=2048,
    norm="layer",
    norm_bias=True,
    activation="relu",
    gated_mlp=False,
    mlp_bias=True,
    qkv_bias=True,
    out_bias=True,
    positions="learned",
    position_offset=2,
    tie_embeddings=True,
)
OPT_30B = dataclasses.replace(
    OPT_6_7B, num_layers=48, d_model=7168, d_ff=28672, num_heads=56, num_kv_heads=56
)
OPT_66B = dataclasses.replace(
    OPT_6_7B, num_layers=64, d_model=9216, d_ff=36864, num_heads=72, num_kv_heads=72
)
LLAMA_2_7B = pj.ModelConfig(
    vocab_size=32000,
    num_layers=32,
    d_model=4096,
    d_ff=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=4096,
    rope=pj.RopeConfig(),
)
LLAMA_2_13B = dataclasses.replace(
    LLAMA_2_7B, num_layers=40, d_model=5120, d_ff=13824, num_heads=40, num_kv_heads=40
)
LLAMA_3_1_8B = dataclasses.replace(
    LLAMA_2_7B,
    vocab_size=128256,
    d_ff=14336,
    num_kv_heads=8,
    max_positions=131072,
    rope=pj.RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=8192),
)
LLAMA_3_1_405B = dataclasses.replace(LLAMA_3_1_8B, num_layers=126, d_model=16384, d_ff=53248, num_heads=128)
LLAMA_3_1_70B = dataclasses.replace(LLAMA_3_1_8B, num_layers=80, d_model=8192, d_ff=28672, num_heads=64)
MISTRAL_7B = dataclasses.replace(
    LLAMA_2_7B,
    vocab_size=32768,
    d_ff=14336,
    num_kv_heads=8,
    max_positions=32768,
    rope=pj.RopeConfig(theta=1e6),
)
QWEN_2_5_14B = dataclasses.replace(
    LLAMA_2_7B,
    vocab_size=152064,
    num_layers=48,
    d_model=5120,
    d_ff=13824,
    num_heads=40,
    num_kv_heads=8,
    max_positions=131072,
    norm_eps=1e-6,
    qkv_bias=True,
    rope=pj.RopeConfig(theta=1e6),
)
TINY = pj.ModelConfig(
    vocab_size=256,
    num_layers=2,
    d_model=32,
    d_ff=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_positions=256,
    rope=pj.RopeConfig(),
)


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """A model and the sizes at which its decoding steps are measured.

    Attributes:
      cache: S, positions of each sequence.
      batches: B to measure.
      head_density: published critical density.
      neuron_density: published mean k / F by batch size, for models with neuron routers.
      dense_layers: layers whose attention stays dense.
    """

    name: str
    config: pj.ModelConfig
    cache: int
    batches: tuple[int, ...]
    head_density: float
    neuron_density: dict[int, float] = dataclasses.field(default_factory=dict)
    dense_layers: tuple[int, ...] = (0,)

    def plan(self, batch: int, *, neurons: bool, mesh: MeshShape = ONE_DEVICE) -> pj.SparsityPlan:
        """The same counts in every layer but the dense ones, rounded up to what the mesh's devices can keep equally."""
        plan = self.plans(mesh).for_batch(mesh.rows(batch), self.config)
        dense: dict[str, Any] = {} if neurons else {"neurons": (None,) * self.config.num_layers}
        return dataclasses.replace(plan, batch_shards=mesh.data, **dense)

    def density_at(self, batch: int) -> float:
        """k / F at the next larger batch size that has a published value, 1 if there is none."""
        known = sorted(self.neuron_density)
        at = bisect.bisect_left(known, batch)
        return self.neuron_density[known[at]] if at < len(known) else 1.0

    def kind(self, batch: int) -> str:
        """What a sparse step keeps, as rows name it."""
        neurons = f", neurons {self.density_at(batch):g}" if self.neuron_density else ""
        return f"heads {self.head_density:g}{neurons}"

    def memory(self, batch: int, mesh: MeshShape = ONE_DEVICE) -> int:
        """Bytes that a step needs on each device: weights, cache, and room for the rest."""
        cache = batch * self.cache * costs.cache_bytes_per_token(self.config) // mesh.devices
        return costs.weights_bytes(self.config, mesh=mesh) + cache + ROOM

    def times(
        self,
        batch: int,
        length: int,
        seconds: float,
        peak: float | None,
        plan: pj.SparsityPlan | None = None,
        mesh: MeshShape = ONE_DEVICE,
    ) -> dict[str, float]:
        """The columns of a step's time with `length` positions in the cache: speed, the bytes that each device must
        move, and the share of the floor: these bytes at `peak` bytes/s, and what the devices exchange."""
        call: dict[str, Any] = {"batch_size": batch, "cache_length": length, "plan": plan, "mesh": mesh}
        moved = costs.decode_bytes(self.config, **call).total
        row = {"ms_per_step": seconds * 1e3, "tokens_per_s": batch / seconds, "bytes": moved}
        if peak is None:
            return row
        return row | {
            "pct_of_floor": 100 * sum(costs.step_floor(self.config, bandwidth=peak, **call)) / seconds
        }

    def _neurons(self, batch: int, shards: int) -> int | None:
        """Neurons kept in each layer, rounded up to a multiple of 128 and of the shards; None for all."""
        density, multiple = self.density_at(batch), math.lcm(128, shards)
        return None if density == 1.0 else -(-int(density * self.config.d_ff) // multiple) * multiple

    def plans(self, mesh: MeshShape = ONE_DEVICE) -> pj.PlanTable:
        """The plans of all batch sizes, as a bundle for this mesh holds them."""
        L, sizes = self.config.num_layers, tuple(sorted(self.neuron_density)) or (1,)
        return pj.PlanTable(
            num_layers=L,
            num_neurons=self.config.d_ff,
            num_groups=self.config.num_kv_heads,
            batch_sizes=sizes,
            neurons=tuple((self._neurons(size, mesh.model),) * L for size in sizes),
            recall=((1.0,) * L,) * len(sizes),
            head_density=self.head_density,
            dense_layers=self.dense_layers,
            neuron_shards=mesh.model,
            group_shards=mesh.model if mesh.attention == "groups" else 1,
        )


def _layer(name: str, config: pj.ModelConfig, cache: int, *densities) -> DecodeShape:
    """One layer of a model that is too large, with next to no vocabulary."""
    config = dataclasses.replace(config, num_layers=1, vocab_size=1024)
    return DecodeShape(name, config, cache, (1, 16, 64), *densities, dense_layers=())


SHAPES = {
    shape.name: shape
    for shape in (
        DecodeShape("opt-6.7b", OPT_6_7B, 1920, (1, 16, 64), 0.5, {1: 0.095, 16: 0.40, 64: 0.62}),
        DecodeShape("llama-2-7b", LLAMA_2_7B, 3968, (1, 16, 48), 0.5),
        DecodeShape("opt-30b", OPT_30B, 1920, (1, 16), 0.4, {1: 0.075, 16: 0.30, 64: 0.53}),
        DecodeShape("llama-2-13b", LLAMA_2_13B, 3968, (1, 16, 32), 0.5),
        DecodeShape("llama-3.1-8b", LLAMA_3_1_8B, 8192, (1, 16, 64), 0.625),
        DecodeShape("mistral-7b", MISTRAL_7B, 8192, (1, 16, 64), 0.5),
        DecodeShape("qwen2.5-14b", QWEN_2_5_14B, 8192, (1, 16, 64), 0.625),
        _layer("opt-66b-layer", OPT_66B, 1920, 0.3, {1: 0.075, 16: 0.26, 64: 0.49}),
        _layer("llama-3.1-70b-layer", LLAMA_3_1_70B, 8192, 0.625),
    )
}
"""OPT-30B and LLaMA-2-13B don't fit into an H200 at batch 64."""

LARGE_SHAPES = {
    shape.name: shape
    for shape in (
        DecodeShape("opt-66b", OPT_66B, 1920, (16, 64), 0.3, {1: 0.075, 16: 0.26, 64: 0.49}),
        DecodeShape("llama-3.1-70b", LLAMA_3_1_70B, 8192, (16, 64, 192), 0.625),
        DecodeShape("llama-3.1-405b", LLAMA_3_1_405B, 8192, (16, 64, 128), 0.625),
    )
}
"""For several devices."""

TINY_SHAPE = DecodeShape("tiny", TINY, 64, (1, 2), 0.5)
"""To try the benches without a GPU."""


def shape_of(name: str) -> DecodeShape:
    """A published shape, or the tiny one."""
    return (SHAPES | LARGE_SHAPES | {TINY_SHAPE.name: TINY_SHAPE})[name]
