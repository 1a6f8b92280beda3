"""Routers: small learned maps from a layer's attention input to scores of its neurons and groups."""

import dataclasses

import jax
import jax.numpy as jnp

from polarjax.configs import ModelConfig
from polarjax.errors import SparsityError
from polarjax.selection.means import Importance
from polarjax.storage.fingerprint import fingerprint_of
from polarjax.types import Array, Float

_FEW_ROWS, _PARTS = 256, 8


def score_groups(
    x: Float[Array, "... D"],
    w_group: Float[Array, "D K"],
    b_group: Float[Array, "K"],
    group_in: Float[Array, "D W"] | None = None,
    group_out: Float[Array, "W K"] | None = None,
) -> Float[Array, "... K"]:
    """Logits that a group is among the important ones, float32; computed in the dtype of `x`.

    A linear map as published; with `group_in` and `group_out`, plus what a hidden layer of W units makes of `x`:
    silu(x · group_in) · group_out.
    """
    if _is_one_row(x):
        return score_groups(_repeated(x), w_group, b_group, group_in, group_out)[:1]
    scores = jnp.dot(x, w_group.astype(x.dtype), preferred_element_type=jnp.float32)
    if group_in is not None and group_out is not None:
        hidden = jax.nn.silu(jnp.dot(x, group_in.astype(x.dtype)))
        scores = scores + jnp.dot(hidden, group_out.astype(x.dtype), preferred_element_type=jnp.float32)
    return scores + jnp.expand_dims(b_group.astype(jnp.float32), range(x.ndim - 1))


def score_neurons(
    x: Float[Array, "... D"], w_in: Float[Array, "D R"], w_out: Float[Array, "R F"]
) -> Float[Array, "... F"]:
    """Logits that a neuron is active, float32; computed in the dtype of `x`."""
    if _is_one_row(x):
        return score_neurons(_repeated(x), w_in, w_out)[:1]
    hidden = _narrow_product(x, w_in.astype(x.dtype))
    return jnp.dot(hidden, w_out.astype(x.dtype), preferred_element_type=jnp.float32)


def _narrow_product(x: Float[Array, "... D"], w_in: Float[Array, "D R"]) -> Float[Array, "... R"]:
    """x · w_in; for the rows of a decoding step the sum of parts, as a product with so few columns keeps few of a GPU's
    multiprocessors busy."""
    few = x.ndim == 2 and isinstance(x.shape[0], int) and x.shape[0] <= _FEW_ROWS  # no int: a symbolic size
    if not few or x.shape[1] % _PARTS:
        return jnp.dot(x, w_in)
    rows, columns = x.reshape(x.shape[0], _PARTS, -1), w_in.reshape(_PARTS, -1, w_in.shape[1])
    over = (((2,), (1,)), ((1,), (0,)))
    return jax.lax.dot_general(rows, columns, over, preferred_element_type=jnp.float32).sum(0).astype(x.dtype)


def _is_one_row(x: Float[Array, "... D"]) -> bool:
    """Whether `x` is one row; XLA then reads a router's narrow matrices twice."""
    return x.ndim == 2 and x.shape[0] == 1


def _repeated(x: Float[Array, "1 D"]) -> Float[Array, "8 D"]:
    return jnp.broadcast_to(x, (8, x.shape[1]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LayerRouter:
    """The routers of one layer; both read the output of the layer's pre-attention norm.

    Attributes:
      w_in: first map of the neuron router [D R], or None if neurons are not routed.
      w_out: its second map [R F]; no bias and no nonlinearity, as published.
      w_group: the group router [D K].
      b_group: its bias [K].
      mean: the mean of each group's part of the attention block's output [K D], which replaces that part where the
        group is skipped; None for zeros, as published.
      group_in, group_out: the group router's hidden layer [D W] and [W K], added to the linear map; None for none, as
        published.
    """

    w_in: Float[Array, "D R"] | None
    w_out: Float[Array, "R F"] | None
    w_group: Float[Array, "D K"]
    b_group: Float[Array, "K"]
    mean: Float[Array, "K D"] | None = None
    group_in: Float[Array, "D W"] | None = None
    group_out: Float[Array, "W K"] | None = None

    def group_scores(self, x: Float[Array, "... D"]) -> Float[Array, "... K"]:
        """As `score_groups`."""
        return score_groups(x, self.w_group, self.b_group, self.group_in, self.group_out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Routers:
    """The learned selector: one `LayerRouter` per layer.

    Attributes:
      layers: L routers.
      weights: fingerprint of the model they were trained on (`polarjax.storage.fingerprint`), "" if unknown.
      importance: what their scores of groups rank, see `polarjax.selection.means.Importance`.
    """

    layers: tuple[LayerRouter, ...]
    weights: str = dataclasses.field(default="", metadata={"static": True})
    importance: Importance = dataclasses.field(default="norms", metadata={"static": True})

    def parameters(self) -> dict[str, Array]:
        """The arrays, keyed by dotted path, for example `layers.0.w_group`."""
        named = {
            f"layers.{i}.{field.name}": getattr(layer, field.name)
            for i, layer in enumerate(self.layers)
            for field in dataclasses.fields(layer)
        }
        return {name: value for name, value in named.items() if value is not None}

    @property
    def fingerprint(self) -> str:
        """Identifies these routers; plans record it when they are calibrated."""
        return fingerprint_of(self.parameters())

    def group_scores(
        self, layer: int, x: Float[Array, "... D"], *, norms: Float[Array, "... K"] | None = None
    ) -> Float[Array, "... K"]:
        """Logits that a group is among the important ones, float32."""
        del norms
        return self.layers[layer].group_scores(x)

    def neuron_scores(
        self, layer: int, x: Float[Array, "... D"], *, activity: Float[Array, "... F"] | None = None
    ) -> Float[Array, "... F"]:
        """Positive score that a neuron is active, float32: `-log(1 - p)` = softplus of the router's logit.

        Summed over a batch, as decoding does, it ranks neurons by the probability that any token makes them
        active. The published score is relu of the logit, which ties all neurons below 0, so a recall of .99
        takes nearly all of them.
        """
        del activity
        router = self.layers[layer]
        if router.w_in is None or router.w_out is None:
            raise SparsityError(
                f"layer {layer} has no neuron router",
                where="routers",
                hint="use routers trained for a ReLU model, or a plan with dense neurons",
            )
        return jax.nn.softplus(score_neurons(x, router.w_in, router.w_out))

    def mean_output(self, layer: int) -> Float[Array, "K D"] | None:
        """What replaces the layer's skipped groups, [K D] in its output; None for zeros."""
        return self.layers[layer].mean

    def check(self, config: ModelConfig) -> None:
        """Raises `SparsityError` unless these routers fit a model of this configuration."""
        if len(self.layers) != config.num_layers:
            raise SparsityError(
                "the routers are for another model",
                where="routers",
                got=f"{len(self.layers)} layers",
                expected=f"{config.num_layers}",
                hint="run polarjax sparsify on this model directory",
            )
        for layer, router in enumerate(self.layers):
            got = {"w_group": router.w_group.shape, "b_group": router.b_group.shape}
            expected = {"w_group": (config.d_model, config.num_kv_heads), "b_group": (config.num_kv_heads,)}
            if router.w_in is not None and router.w_out is not None:
                rank = router.w_in.shape[-1]
                got |= {"w_in": router.w_in.shape, "w_out": router.w_out.shape}
                expected |= {"w_in": (config.d_model, rank), "w_out": (rank, config.d_ff)}
            if router.group_in is not None and router.group_out is not None:
                width = router.group_in.shape[-1]
                got |= {"group_in": router.group_in.shape, "group_out": router.group_out.shape}
                expected |= {"group_in": (config.d_model, width), "group_out": (width, config.num_kv_heads)}
            if router.mean is not None:
                got["mean"] = router.mean.shape
                expected["mean"] = (config.num_kv_heads, config.d_model)
            if got != expected:
                raise SparsityError(
                    f"the routers of layer {layer} are for another model",
                    where="routers",
                    got=str(got),
                    expected=str(expected),
                    hint="run polarjax sparsify on this model directory",
                )


def router_rank(config: ModelConfig) -> int:
    """R: 1024 as published, at most D, since the product of the two maps can't have a higher rank."""
    return min(1024, config.d_model)


def hidden_layer(key: Array, width: int, shape: tuple[int, ...]) -> dict[str, Array]:
    """The arrays of a hidden layer that adds nothing yet to group routers with `w_group` [... D K] of this shape."""
    *layers, D, K = shape
    group_in = jax.random.normal(key, (*layers, D, width), jnp.float32) * D**-0.5
    return {"group_in": group_in, "group_out": jnp.zeros((*layers, width, K))}


def init_routers(
    config: ModelConfig, key: Array, *, rank: int | None = None, neurons: bool | None = None, width: int = 0
) -> Routers:
    """Untrained routers, float32. The scores of groups start at zero: a single linear map has no symmetry to break.

    Args:
      config: the model's configuration.
      key: random key.
      rank: R of the neuron routers; `router_rank(config)` when None.
      neurons: whether to make neuron routers; None makes them for ReLU models.
      width: W, units of the group routers' hidden layer; 0 makes none.
    """
    rank = rank or router_rank(config)
    neurons = config.neuron_sparsity if neurons is None else neurons
    D, F, K = config.d_model, config.d_ff, config.num_kv_heads

    def layer(key: Array) -> LayerRouter:
        keys = jax.random.split(key)
        normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5
        w_in, w_out = (normal(keys[0], D, rank), normal(keys[1], rank, F)) if neurons else (None, None)
        hidden = hidden_layer(key, width, (D, K)) if width else {}
        return LayerRouter(w_in, w_out, jnp.zeros((D, K)), jnp.zeros((K,)), **hidden)

    return Routers(tuple(layer(k) for k in jax.random.split(key, config.num_layers)))
