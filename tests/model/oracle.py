"""The decoder once more, in NumPy float64: one sequence, one head, one position at a time. Slow and plain."""

import math

import numpy as np

from polarjax.configs import ModelConfig, RopeConfig


def frequencies(rope: RopeConfig, width: int) -> list[float]:
    """Radians per position of each pair, by the published case distinction on the wavelength."""
    result = []
    for pair in range(width // 2):
        plain = rope.theta ** (-2 * pair / width)
        if rope.scaling == "linear":
            result.append(plain / rope.factor)
        elif rope.scaling == "llama3":
            assert rope.original_max_positions is not None
            wavelength = 2 * math.pi / plain
            longest = rope.original_max_positions / rope.low_freq_factor
            shortest = rope.original_max_positions / rope.high_freq_factor
            if wavelength > longest:
                result.append(plain / rope.factor)
            elif wavelength < shortest:
                result.append(plain)
            else:
                turns = rope.original_max_positions / wavelength
                share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
                result.append(plain / rope.factor * (1 - share) + plain * share)
        else:
            result.append(plain)
    return result


def rotate(head: np.ndarray, position: int, rope: RopeConfig) -> np.ndarray:
    """The head [H] as H/2 complex numbers, each turned by its own angle."""
    half = len(head) // 2
    turned = (head[:half] + 1j * head[half:]) * np.exp(1j * position * np.array(frequencies(rope, len(head))))
    return np.concatenate([turned.real, turned.imag])


def normalise(x: np.ndarray, kind: str, eps: float, scale: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """RMS or layer norm of one vector."""
    x = x - x.mean() if kind == "layer" else x
    x = x / math.sqrt(np.mean(x**2) + eps) * scale
    return x if bias is None else x + bias


def activate(x: np.ndarray, kind: str, threshold: float = 0.0) -> np.ndarray:
    """The activation function, from its definition."""
    if kind == "relu":
        return np.where(x > threshold, x, 0)
    if kind == "silu":
        return x / (1 + np.exp(-x))
    return np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])


class Oracle:
    """Reads a decoder's parameters by name and computes one sequence.

    After a call, `inputs`, `active`, `norms` and `changes` hold what taps should have recorded: lists over layers and
    positions.
    """

    def __init__(self, config: ModelConfig, parameters: dict):
        self.config = config
        self.p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """Logits [T V]."""
        config, p = self.config, self.p
        self.inputs, self.active, self.norms, self.changes = [], [], [], []
        rows = []
        for position, token in enumerate(tokens):
            x = p["embed.tokens"][token]
            if config.embed_dim is not None:
                x = x @ p["embed.project_in"]
            if config.positions == "learned":
                x = x + p["embed.positions"][position + config.position_offset]
            rows.append(x)
        for layer in range(config.num_layers):
            rows = self._layer(layer, rows)
        return np.stack([self._head(x) for x in rows])

    def _head(self, x: np.ndarray) -> np.ndarray:
        if self.config.final_norm:
            x = self._norm("final_norm", x)
        if self.config.embed_dim is not None:
            x = x @ self.p["embed.project_out"]
        table = self.p["embed.tokens" if self.config.tie_embeddings else "head.w"]
        return table @ x

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        config = self.config
        return normalise(x, config.norm, config.norm_eps, self.p[f"{name}.scale"], self.p.get(f"{name}.bias"))

    def _layer(self, layer: int, rows: list[np.ndarray]) -> list[np.ndarray]:
        before = self.config.norm_position == "pre"
        inputs = [self._norm(f"layers.{layer}.attn_norm", x) if before else x for x in rows]
        self.inputs.append(inputs)
        turned = [x + y for x, y in zip(rows, self._attention(layer, inputs), strict=True)]
        length = np.linalg.norm
        self.changes.append([1 - x @ y / length(x) / length(y) for x, y in zip(rows, turned, strict=True)])
        rows = turned
        rows = rows if before else [self._norm(f"layers.{layer}.attn_norm", x) for x in rows]
        inputs = [self._norm(f"layers.{layer}.mlp_norm", x) if before else x for x in rows]
        rows = [x + y for x, y in zip(rows, self._mlp(layer, inputs), strict=True)]
        return rows if before else [self._norm(f"layers.{layer}.mlp_norm", x) for x in rows]

    def _project(
        self, layer: int, name: str, x: np.ndarray, position: int, head: tuple[int, ...]
    ) -> np.ndarray:
        """One head of the query, key or value at one position."""
        config, path = self.config, f"layers.{layer}.attn"
        y = x @ self.p[f"{path}.w{name}"][:, *head]
        if config.qkv_bias:
            y = y + self.p[f"{path}.b{name}"][head]
        if config.qk_norm and name != "v":
            y = normalise(y, "rms", config.norm_eps, self.p[f"{path}.{name}_norm.scale"], None)
        if config.rope is not None and name != "v":
            y = rotate(y, position, config.rope)
        return y

    def _attention(self, layer: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        config, path = self.config, f"layers.{layer}.attn"
        G, H = config.q_per_group, config.head_dim
        updates, norms = [], []
        for now, x in enumerate(inputs):
            window = config.window(layer)
            seen = [t for t in range(now + 1) if window is None or now - t < window]
            update = self.p[f"{path}.bo"].copy() if config.out_bias else np.zeros(config.d_model)
            squares = []
            for group in range(config.num_kv_heads):
                keys = [self._project(layer, "k", inputs[t], t, (group,)) for t in seen]
                values = [self._project(layer, "v", inputs[t], t, (group,)) for t in seen]
                heads = []
                for member in range(G):
                    query = self._project(layer, "q", x, now, (group, member))
                    weights = np.exp([query @ key / math.sqrt(H) for key in keys])
                    head = sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))
                    update += head @ self.p[f"{path}.wo"][group, member]
                    heads.append(head)
                squares.append(np.sum(np.square(heads)))
            updates.append(update)
            norms.append(np.sqrt(squares))
        self.norms.append(norms)
        return updates

    def _mlp(self, layer: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        config, path = self.config, f"layers.{layer}.mlp"
        updates, active = [], []
        for x in inputs:
            up = self.p[f"{path}.w_up"] @ x + (self.p[f"{path}.b_up"] if config.mlp_bias else 0)
            gate = up
            if config.gated_mlp:
                gate = self.p[f"{path}.w_gate"] @ x + (self.p[f"{path}.b_gate"] if config.mlp_bias else 0)
            hidden = activate(gate, config.activation, config.activation_threshold) * (
                up if config.gated_mlp else 1
            )
            active.append(gate > config.activation_threshold)
            updates.append(
                hidden @ self.p[f"{path}.w_down"] + (self.p[f"{path}.b_down"] if config.mlp_bias else 0)
            )
        self.active.append(active)
        return updates
