"""Configurations of published models, for measuring whole decoding steps with random weights."""

from dataclasses import dataclass

import polarjax as pj
from polarjax.selection.plans import uniform_groups

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


@dataclass(frozen=True)
class DecodeShape:
    """A model and the sizes at which its decoding steps are measured.

    Attributes:
      cache: S, positions of each sequence.
      batches: B to measure.
      head_density: published critical density; the first layer's attention stays dense.
      neuron_density: published mean k / F of each batch size, for models with neuron routers.
    """

    name: str
    config: pj.ModelConfig
    cache: int
    batches: tuple[int, ...]
    head_density: float
    neuron_density: dict[int, float]

    def plan(self, batch: int, *, neurons: bool) -> pj.SparsityPlan:
        """The same counts in every layer, with neurons rounded up to a multiple of 128."""
        layers = self.config.num_layers
        groups = uniform_groups(self.config, self.head_density)
        kept = -(-int(self.neuron_density.get(batch, 1.0) * self.config.d_ff) // 128) * 128
        return pj.SparsityPlan((kept if neurons else None,) * layers, groups)


SHAPES = {
    shape.name: shape
    for shape in (
        DecodeShape("opt-6.7b", OPT_6_7B, 1920, (1, 16, 64), 0.5, {1: 0.095, 16: 0.40, 64: 0.62}),
        DecodeShape("llama-2-7b", LLAMA_2_7B, 3968, (1, 16, 48), 0.5, {}),
    )
}
