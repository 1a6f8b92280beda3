"""A dense decoding step in PyTorch, with random weights: fused projections, and a cache that is written in place."""

from typing import Any

import torch
import torch.nn.functional as F

import polarjax as pj

Tensors = dict[str, torch.Tensor]


class TorchStep:
    """A greedy step of B sequences, whose position [1] is the same.

    Attributes:
      layers: of each layer: `qkv` [(N + 2K)·H, D], `out` [D, N·H], `up` [F, D] (gate and up, [2F, D], if gated), `down`
        [D, F], norms `norm_attn` and `norm_mlp` [D], and the same names with `_bias` where the model has biases.
      embed, head, norm, norm_bias: [V, D], [V, D], [D], [D]; positions: [max_positions + offset, D] if learned.
      keys, values: [B, K, S, H] of each layer.
    """

    def __init__(
        self,
        config: pj.ModelConfig,
        batch: int,
        cache: int,
        *,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config, self.options = config, {"device": device, "dtype": dtype}
        D, V, K, H = config.d_model, config.vocab_size, config.num_kv_heads, config.head_dim
        self.layers = [self._layer() for _ in range(config.num_layers)]
        self.embed = self._weight(V, D)
        self.head = self.embed if config.tie_embeddings else self._weight(V, D)
        self.norm, self.norm_bias = torch.ones(D, **self.options), torch.zeros(D, **self.options)
        learned = config.positions == "learned"
        self.positions = self._weight(config.max_positions + config.position_offset, D) if learned else None
        room = lambda: [torch.randn(batch, K, cache, H, **self.options) for _ in self.layers]
        self.keys, self.values = room(), room()

    def _weight(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, **self.options) * self.config.d_model**-0.5

    def _layer(self) -> Tensors:
        c, ones = self.config, torch.ones(self.config.d_model, **self.options)
        D, H, N, K, ups = c.d_model, c.head_dim, c.num_heads, c.num_kv_heads, 2 if c.gated_mlp else 1
        made = {
            "qkv": self._weight((N + 2 * K) * H, D),
            "out": self._weight(D, N * H),
            "up": self._weight(ups * c.d_ff, D),
            "down": self._weight(D, c.d_ff),
            "norm_attn": ones,
            "norm_mlp": ones.clone(),
        }
        biases = {
            "qkv": c.qkv_bias,
            "out": c.out_bias,
            "up": c.mlp_bias,
            "down": c.mlp_bias,
            "norm_attn": c.norm_bias,
            "norm_mlp": c.norm_bias,
        }
        for name, there in biases.items():
            if there:
                made[f"{name}_bias"] = self._weight(made[name].shape[0])
        return made

    def _normed(self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        width, eps = (self.config.d_model,), self.config.norm_eps
        if self.config.norm == "layer":
            return F.layer_norm(x, width, scale, bias, eps)
        return F.rms_norm(x, width, scale, eps)

    def _rotation(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of the plain rotary embedding; scaling changes the angles, not the work."""
        if self.config.rope is None:
            return None
        H = self.config.head_dim
        steps = torch.arange(0, H, 2, device=position.device, dtype=torch.float32) / H
        angles = position.float() * self.config.rope.theta**-steps
        return angles.cos().to(self.embed.dtype), angles.sin().to(self.embed.dtype)

    def _attention(self, i: int, h: torch.Tensor, position: torch.Tensor, rotation: Any) -> torch.Tensor:
        c, layer, B = self.config, self.layers[i], h.shape[0]
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        qkv = F.linear(h, layer["qkv"], layer.get("qkv_bias")).view(B, N + 2 * K, 1, H)
        q, k, v = qkv.split([N, K, K], 1)
        if rotation is not None:
            q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        self.keys[i].index_copy_(2, position, k)
        self.values[i].index_copy_(2, position, v)
        heads = F.scaled_dot_product_attention(q, self.keys[i], self.values[i], enable_gqa=K != N)
        return F.linear(heads.reshape(B, N * H), layer["out"], layer.get("out_bias"))

    def _mlp(self, i: int, h: torch.Tensor) -> torch.Tensor:
        layer = self.layers[i]
        up = F.linear(h, layer["up"], layer.get("up_bias"))
        act = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}[self.config.activation]
        if self.config.gated_mlp:
            gate, up = up.chunk(2, -1)
            hidden = act(gate) * up
        else:
            hidden = act(up)
        return F.linear(hidden, layer["down"], layer.get("down_bias"))

    def logits(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[B V], after appending `token` at `position`; attends to the whole cache."""
        x = self.embed[token]
        if self.positions is not None:
            x = x + self.positions[position + self.config.position_offset]
        rotation = self._rotation(position)
        for i, layer in enumerate(self.layers):
            h = self._normed(x, layer["norm_attn"], layer.get("norm_attn_bias"))
            x = x + self._attention(i, h, position, rotation)
            h = self._normed(x, layer["norm_mlp"], layer.get("norm_mlp_bias"))
            x = x + self._mlp(i, h)
        return F.linear(self._normed(x, self.norm, self.norm_bias), self.head)

    def next_tokens(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The likeliest next tokens [B]."""
        return self.logits(token, position).argmax(-1)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
