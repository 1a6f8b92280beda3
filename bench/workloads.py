"""The named shapes that kernels are measured on: models, batch sizes, densities, cache lengths."""

from dataclasses import dataclass

from polarjax.selection.plans import groups_kept


@dataclass(frozen=True)
class ModelShape:
    """The shapes of one layer of a published model.

    `critical` is its published head density; `threshold` is the value that a pre-activation of its ReLU must exceed.
    """

    name: str
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    gated: bool
    critical: float
    threshold: float = 0.0

    @property
    def queries(self) -> int:
        """Query heads per KV group."""
        return self.heads // self.kv_heads


MODELS = {
    model.name: model
    for model in (
        ModelShape("opt-6.7b", 4096, 16384, 32, 32, 128, "relu", False, 0.5),
        ModelShape("opt-30b", 7168, 28672, 56, 56, 128, "relu", False, 0.4),
        ModelShape("opt-66b", 9216, 36864, 72, 72, 128, "relu", False, 0.3),
        ModelShape("llama-2-7b", 4096, 11008, 32, 32, 128, "silu", True, 0.5),
        ModelShape("llama-3.1-8b", 4096, 14336, 32, 8, 128, "silu", True, 0.625),
        ModelShape("llama-3.1-70b", 8192, 28672, 64, 8, 128, "silu", True, 0.625),
        ModelShape("mistral-7b", 4096, 14336, 32, 8, 128, "silu", True, 0.5),
        ModelShape("qwen2.5-14b", 5120, 13824, 40, 8, 128, "silu", True, 0.625),
    )
}
MLP_MODELS = MODELS | {
    model.name: model
    for model in (
        ModelShape("relu-llama-2-7b", 4096, 11008, 32, 32, 128, "relu", True, 0.5),
        ModelShape("prosparse-llama-2-7b", 4096, 11008, 32, 32, 128, "relu", True, 0.5, 0.01),
    )
}
"""The same, and two that differ from llama-2-7b only in the activation."""
BATCHES = (1, 8, 16, 64, 256)
DENSITIES = (0.1, 0.3, 0.5, 0.625, 1.0)
CACHES = (1920, 3968, 8192)
CACHE_OF = {"opt": (1920,), "llama-2": (1920, 3968)}  # models with too few positions for the longer caches


@dataclass(frozen=True)
class AttentionCase:
    """One decode attention: a model's layer, B sequences of `cache` tokens each, a density of KV groups."""

    model: ModelShape
    batch: int
    cache: int
    density: float

    @property
    def selected(self) -> int | None:
        """Groups per sequence, as in plans; None means all."""
        return None if self.density == 1 else groups_kept(self.density, self.model.kv_heads)

    @property
    def cache_bytes(self) -> int:
        """Bytes of selected keys and values in a 16-bit cache."""
        groups = self.selected or self.model.kv_heads
        return self.batch * groups * self.cache * self.model.head_dim * 2 * 2

    @property
    def held_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.batch * self.model.kv_heads * self.cache * self.model.head_dim * 2 * 2

    def __str__(self) -> str:
        return f"{self.model.name} B{self.batch} S{self.cache} d{self.density:g}"


def caches(model: ModelShape) -> tuple[int, ...]:
    """Cache lengths that the model's positions allow."""
    return next((known for prefix, known in CACHE_OF.items() if model.name.startswith(prefix)), CACHES)


def attention_cases(max_bytes: float = 60e9) -> list[AttentionCase]:
    """Every named decode attention whose whole cache takes at most `max_bytes`."""
    cases = [
        AttentionCase(model, batch, cache, density)
        for model in MODELS.values()
        for cache in caches(model)
        for batch in BATCHES
        for density in DENSITIES
    ]
    return [case for case in cases if case.held_bytes <= max_bytes]
