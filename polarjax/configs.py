"""Model configuration: the options by which one decoder covers several families."""

import dataclasses
import sys
from typing import Any, Literal

from polarjax.errors import UnsupportedConfigError
from polarjax.numeric import items, make_plain


def _check(ok: bool, name: str, got: Any, expected: str) -> None:
    if not ok:
        raise UnsupportedConfigError(
            f"{name} is not usable",
            where="model config",
            got=repr(got),
            expected=expected,
            hint="correct it in config.json, or in the arguments of ModelConfig",
        )


def _check_positive(name: str, value: Any) -> None:
    _check(type(value) is int and value > 0, name, value, "a positive whole number")


def _check_above_zero(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and 0 < value <= sys.float_info.max
    _check(number, name, value, "a positive number")


def _check_threshold(value: Any, activation: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _check(
        number and 0 <= value <= _FLOAT32_MAX,
        "activation_threshold",
        value,
        "a number, zero or more, finite in float32",
    )
    _check(
        value == 0 or activation == "relu",
        "activation_threshold",
        value,
        f"0, because activation = {activation!r}",
    )


def _check_keys(cls: type, data: dict[str, Any]) -> None:
    fields = dataclasses.fields(cls)
    unknown = sorted(set(data) - {field.name for field in fields})
    _check(not unknown, "keys", unknown, "known keys only")
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing = sorted(required - set(data))
    _check(not missing, "keys", f"no {', '.join(missing)}", "every required key")


type NormKind = Literal["rms", "layer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      theta: base of the frequencies; per position, component i of a head of width H rotates by `theta ** (-2 i / H)`
        radians.
      scaling: None, "linear" (all frequencies divided by `factor`) or "llama3" (low frequencies divided by
        `factor`, high ones kept, a linear band between; Llama 3.1 model card).
      factor: how many times longer the context becomes.
      low_freq_factor: wavelengths above `original_max_positions / low_freq_factor` are fully scaled.
      high_freq_factor: wavelengths below `original_max_positions / high_freq_factor` are kept.
      original_max_positions: context length before scaling, in tokens ("llama3" only).
    """

    theta: float = 10_000.0
    scaling: Literal["linear", "llama3"] | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int | None = None

    def __post_init__(self) -> None:
        make_plain(self, *(field.name for field in dataclasses.fields(self)))
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            _check_above_zero(f"rope.{name}", getattr(self, name))
        _check(
            self.scaling in (None, "linear", "llama3"),
            "rope.scaling",
            self.scaling,
            "None, 'linear' or 'llama3'",
        )
        if self.scaling == "llama3":
            _check_positive("rope.original_max_positions", self.original_max_positions)
            _check(
                self.low_freq_factor < self.high_freq_factor,
                "rope.low_freq_factor",
                self.low_freq_factor,
                f"less than high_freq_factor = {self.high_freq_factor}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that distinguishes one decoder from another; hashable, so it can be static under `jax.jit`.

    Attributes:
      vocab_size: V, rows of the embedding table.
      num_layers: L.
      d_model: D, width of the residual stream.
      d_ff: F, neurons of each MLP.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads (= groups); divides N.
      head_dim: H; need not be D / N.
      max_positions: longest sequence, in tokens.
      norm: "rms" or "layer"; `norm_eps` is added to the variance; `norm_bias` adds a bias.
      norm_position: "pre" (before each block) or "post" (after each residual sum).
      final_norm: whether a norm precedes the head.
      activation: the MLP's ("gelu" is the exact, erf-based one).
      activation_threshold: with "relu", a pre-activation is kept if it exceeds this, compared in float32, and becomes 0
        otherwise. 0 is the plain ReLU; above 0 it is ProSparse's FATReLU.
      gated_mlp: `act(x w_gate) * (x w_up)` instead of `act(x w_up)`.
      mlp_bias, qkv_bias, out_bias: which projections have biases.
      qk_norm: RMS norm of queries and keys over H, before the rotary embedding.
      positions: "learned" (a table, read at position + `position_offset`) or "rope".
      sliding_window: None, one width in tokens, or one (or None) per layer: attention covers only the latest `window`
        positions, including the current one.
      embed_dim: E, width of the embedding table if it differs from D (then projections map E to D and back).
      tie_embeddings: the head reuses the embedding table.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_position: Literal["pre", "post"] = "pre"
    final_norm: bool = True
    activation: Literal["relu", "silu", "gelu"] = "silu"
    activation_threshold: float = 0.0
    gated_mlp: bool = True
    mlp_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    positions: Literal["learned", "rope"] = "rope"
    position_offset: int = 0
    rope: RopeConfig | None = None
    sliding_window: int | tuple[int | None, ...] | None = None
    embed_dim: int | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        make_plain(self, *(field.name for field in dataclasses.fields(self)))
        if self.sliding_window is not None:
            windows = items(self.sliding_window)
            object.__setattr__(self, "sliding_window", self.sliding_window if windows is None else windows)
        for name in ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim"):
            _check_positive(name, getattr(self, name))
        _check_positive("max_positions", self.max_positions)
        for name, choices in _CHOICES.items():
            _check(getattr(self, name) in choices, name, getattr(self, name), " or ".join(map(repr, choices)))
        _check(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        for name in _FLAGS:
            _check(type(getattr(self, name)) is bool, name, getattr(self, name), "True or False")
        _check_above_zero("norm_eps", self.norm_eps)
        _check_threshold(self.activation_threshold, self.activation)
        if self.positions == "learned":
            _check(self.rope is None, "rope", self.rope, "None, because positions = 'learned'")
        else:
            rotary = isinstance(self.rope, RopeConfig)
            _check(rotary, "rope", self.rope, "a RopeConfig, because positions = 'rope'")
            _check(
                self.head_dim % 2 == 0,
                "head_dim",
                self.head_dim,
                "an even number, because positions = 'rope'",
            )
        whole = type(self.position_offset) is int and self.position_offset >= 0
        _check(whole, "position_offset", self.position_offset, "a whole number, zero or more")
        if isinstance(self.sliding_window, tuple):
            _check(
                len(self.sliding_window) == self.num_layers,
                "sliding_window",
                self.sliding_window,
                f"one entry for each of the {self.num_layers} layers",
            )
        for layer in range(self.num_layers):
            if self.window(layer) is not None:
                _check_positive("sliding_window", self.window(layer))
        if self.embed_dim is not None:
            _check_positive("embed_dim", self.embed_dim)

    @property
    def q_per_group(self) -> int:
        """G = N / K, the query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def neuron_sparsity(self) -> bool:
        """Whether inactive neurons contribute exact zeros, so that skipping them is exact (ReLU only)."""
        return self.activation == "relu"

    def window(self, layer: int) -> int | None:
        """Sliding-window width of `layer` in tokens, or None for full attention."""
        return self.sliding_window[layer] if isinstance(self.sliding_window, tuple) else self.sliding_window

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` turns back into an equal config.

        A threshold of 0 is left out, so that plain models keep the fingerprints they had before the field existed.
        """
        data = dataclasses.asdict(self)
        if not self.activation_threshold:
            del data["activation_threshold"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelConfig":
        """Builds a config from `to_json` output; raises `UnsupportedConfigError` on a missing or unknown key."""
        data = dict(data)
        _check_keys(cls, data)
        if data.get("rope") is not None:
            _check(isinstance(data["rope"], dict), "rope", data["rope"], "an object, or null")
            _check_keys(RopeConfig, data["rope"])
            data["rope"] = RopeConfig(**data["rope"])
        return cls(**data)


_FLOAT32_MAX = 3.4028234663852886e38
_FLAGS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.type is bool)
_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post"),
    "activation": ("relu", "silu", "gelu"),
    "positions": ("learned", "rope"),
}
