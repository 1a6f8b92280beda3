"""Bytes moved and floating-point operations computed by one decoding step, by closed formula."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model.exchanges import NVLINK, Link, exchanges
from polarjax.model.mesh_shape import ONE_DEVICE, MeshShape
from polarjax.model.shapes import shapes
from polarjax.numeric import check_type, plain, shown, whole_number
from polarjax.selection.plans import SparsityPlan, dense_plan
from polarjax.storage.dtypes import check_dtype
from polarjax.types import DTypeLike


@dataclasses.dataclass(frozen=True)
class Cost:
    """The parts of one decoding step, in bytes or in floating-point operations.

    Attributes:
      batch_size: B; the step produces one token for each sequence.
      attention: QKV and output projections with their norms (bytes), or their products (operations).
      mlp: the kept MLP neurons and the norm before them.
      head: the output projection, the final norm, and the embedding rows of the step's tokens.
      cache: keys and values read and appended (bytes), or scores and weighted sums over them (operations).
      routers: the routers of every layer that the plan makes sparse.
    """

    batch_size: int
    attention: int
    mlp: int
    head: int
    cache: int
    routers: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.attention + self.mlp + self.head + self.cache + self.routers

    @property
    def per_token(self) -> float:
        """The total divided by the B tokens of the step."""
        return self.total / self.batch_size

    def to_json(self) -> dict[str, float]:
        """All parts, the total and the cost per token."""
        return dataclasses.asdict(self) | {"total": self.total, "per_token": self.per_token}


def decode_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    cache_length: int,
    plan: SparsityPlan | None = None,
    dtype: DTypeLike = "bfloat16",
    router_rank: int | None = None,
    mean_outputs: bool = False,
    router_width: int = 0,
    mesh: MeshShape = ONE_DEVICE,
) -> Cost:
    """The fewest bytes that a decoding step can move on one device: each weight is read once for the whole batch.

    With e bytes per element, k_g groups and k_f neurons kept (K and F where dense), s = min(S, window), all
    biases and norms included, summed over layers:
      attention  e·(2·D·N·H + 2·D·K·H)
      mlp        e·2·k_f·D, or e·3·k_f·D if gated
      head       e·(V·E + B·E), plus e·B·D with learned positions, plus e·2·D·E with projected embeddings
      cache      e·2·B·H·(k_g·s + K): reads the kept groups, appends to all
      routers    e·(D·K + K) where groups are selected, and e·K·D more with mean outputs, and e·W·(D + K) more with a
                 hidden layer; e·R·(D + F) where neurons are
    Activations do not count: they stay in on-chip caches. On a mesh, these are the formulas with one device's groups,
    neurons, vocabulary and sequences.

    Args:
      config: the model's configuration.
      batch_size: B, over all devices.
      cache_length: S, positions that each sequence attends to, including the new one.
      plan: what is kept; None for the dense model.
      dtype: dtype of weights, routers and cache.
      router_rank: R of the neuron routers; None for the default of `init_routers`.
      mean_outputs: whether the routers hold mean outputs of skipped groups, as `sparsify` learns by default.
      router_width: W of the group routers' hidden layer, as `tune --router-width` adds; 0 for none.
      mesh: the devices that share the step.

    Returns:
      The cost of one device; its `batch_size` is that of the sequences that share the device's weights.

    Raises:
      InputError: `batch_size` or `cache_length` is not positive, or the mesh doesn't divide the model or the batch.
      SparsityError: the plan is for another model.
    """
    batch_size, cache_length = _check(config, batch_size, cache_length, plan)
    whole, all_kept, plan = config, plan, _local_plan(plan, mesh)
    config, batch_size = mesh.local(config), mesh.rows(batch_size)
    norm = _norm(config)
    neurons = [neurons for neurons, _, _ in _kept(config, cache_length, plan)]
    alone = mesh.attention == "groups"
    attending = (config, plan, batch_size) if alone else (whole, all_kept, batch_size // mesh.model)
    rank = _rank(config, router_rank)
    parts = {
        "attention": config.num_layers * (_attention_weights(config) + norm),
        "mlp": sum(kept * _neuron_weights(config) + _down_bias(config) + norm for kept in neurons),
        "head": _head(config, batch_size),
        "cache": _cache(*attending, cache_length),
        "routers": _router_weights(config, plan, rank, router_width, bias=True, means=mean_outputs),
    }
    size = _bytes_each(dtype)
    return Cost(batch_size, **{name: size * count for name, count in parts.items()})


def decode_flops(
    config: ModelConfig,
    *,
    batch_size: int,
    cache_length: int,
    plan: SparsityPlan | None = None,
    router_rank: int | None = None,
    mean_outputs: bool = False,
    router_width: int = 0,
) -> Cost:
    """Floating-point operations in the matrix products of a decoding step; each multiply-add counts as 2.

    With the letters of `decode_bytes`, summed over layers:
      attention  2·B·(2·D·N·H + 2·D·K·H)
      mlp        2·B·2·k_f·D, or 2·B·3·k_f·D if gated
      head       2·B·V·E, plus 4·B·D·E with projected embeddings
      cache      4·B·k_g·G·s·H: scores and weighted sum
      routers    2·B·D·K where groups are selected, twice that with mean outputs, and 2·B·W·(D + K) with a hidden layer;
                 2·B·R·(D + F) where neurons are

    Raises:
      InputError: `batch_size` or `cache_length` is not positive.
      SparsityError: the plan is for another model.
    """
    batch_size, cache_length = _check(config, batch_size, cache_length, plan)
    rank = _rank(config, router_rank)
    D, H = config.d_model, config.head_dim
    width = config.embed_dim or D
    kept = list(_kept(config, cache_length, plan))
    head = config.vocab_size * width + (2 * D * width if config.embed_dim else 0)
    pairs = sum(groups * config.q_per_group * length for _, groups, length in kept)
    parts = {
        "attention": config.num_layers * 2 * D * H * (config.num_heads + config.num_kv_heads),
        "mlp": sum(neurons for neurons, _, _ in kept) * _matrices(config) * D,
        "head": head,
        "cache": 2 * pairs * H,
        "routers": _router_weights(config, plan, rank, router_width, bias=False, means=mean_outputs),
    }
    return Cost(batch_size, **{name: 2 * batch_size * count for name, count in parts.items()})


def step_floor(
    config: ModelConfig,
    *,
    batch_size: int,
    cache_length: int,
    mesh: MeshShape = ONE_DEVICE,
    plan: SparsityPlan | None = None,
    dtype: DTypeLike = "bfloat16",
    bandwidth: float,
    link: Link = NVLINK,
) -> tuple[float, float]:
    """The least time of a decoding step in seconds: for one device's bytes, and for what the devices exchange.

    The step can't be faster than their sum unless the exchanges are hidden.

    Args:
      config, batch_size, cache_length, mesh, plan, dtype: as in `decode_bytes`.
      bandwidth: bytes per second of a device's memory.
      link: times of the exchanges between devices.

    Raises:
      InputError: a size is not positive, or the mesh doesn't divide the model or the batch.
      SparsityError: the plan is for another model.
    """
    options: dict[str, Any] = {"cache_length": cache_length, "plan": plan, "dtype": dtype, "mesh": mesh}
    moved = decode_bytes(config, batch_size=batch_size, **options).total
    found = exchanges(config, mesh, batch_size=batch_size, item=_bytes_each(dtype))
    return moved / bandwidth, sum(each.count * link.seconds(each, mesh.model) for each in found)


def weights_bytes(config: ModelConfig, dtype: DTypeLike = "bfloat16", *, mesh: MeshShape = ONE_DEVICE) -> int:
    """Bytes of the parameters that each device of the mesh holds; a tied embedding table counts once."""
    _check_config(config)
    return _bytes_each(dtype) * sum(map(math.prod, shapes(mesh.local(config)).values()))


def cache_bytes_per_token(config: ModelConfig, dtype: DTypeLike = "bfloat16") -> int:
    """Bytes that one position of one sequence takes in the cache: e·2·L·K·H."""
    _check_config(config)
    return _bytes_each(dtype) * 2 * config.num_layers * config.num_kv_heads * config.head_dim


def largest_batch(
    config: ModelConfig,
    *,
    memory: float,
    cache_length: int,
    dtype: DTypeLike = "bfloat16",
    mesh: MeshShape = ONE_DEVICE,
) -> int:
    """How many sequences fit next to the weights: floor((memory − weights) / (S·cache_bytes_per_token + 4·V)).

    Counts the cache and the float32 logits of each sequence, but not the temporaries of a step or prefill.

    Args:
      config: the model's configuration.
      memory: memory of each device, in bytes; finite.
      cache_length: S, positions that the cache holds for each sequence.
      dtype: dtype of weights and cache.
      mesh: the devices that share the model and the sequences.

    Returns:
      the number of sequences on all devices, evenly divided; 0 if not even one a device fits.

    Raises:
      InputError: `cache_length` is not positive, `memory` is not finite, or the mesh doesn't divide the model.
    """
    _, cache_length = _check(config, 1, cache_length, None)
    memory = plain(memory)
    if type(memory) not in (int, float) or not -math.inf < memory < math.inf:
        hint = "pass the device's memory in bytes"
        raise InputError(
            "memory is not finite", where="costs", got=shown(memory), expected="bytes", hint=hint
        )
    local = mesh.local(config)
    each = cache_length * cache_bytes_per_token(local, dtype) + 4 * local.vocab_size
    together = mesh.batch_parts // mesh.data
    rows = max(0, int(memory - weights_bytes(config, dtype, mesh=mesh)) // each) // together * together
    return mesh.data * rows


def _check(config: Any, batch_size: Any, cache_length: Any, plan: Any) -> tuple[int, int]:
    """The batch size and the cache's length as integers."""
    _check_config(config)
    if plan is not None:
        check_type(plan, SparsityPlan, where="costs", hint="pass a SparsityPlan, or None for the dense model")
        plan.check(config)
    return (
        whole_number(batch_size, "batch_size", where="costs"),
        whole_number(cache_length, "cache_length", where="costs"),
    )


def _check_config(config: Any) -> None:
    check_type(config, ModelConfig, where="costs", hint="pass model.config")


def _bytes_each(dtype: DTypeLike) -> int:
    return check_dtype(dtype, where="costs").itemsize


def _rank(config: ModelConfig, rank: Any) -> int:
    return _default_rank(config) if rank is None else whole_number(rank, "router_rank", where="costs")


def _kept(
    config: ModelConfig, cache_length: int, plan: SparsityPlan | None
) -> Iterator[tuple[int, int, int]]:
    """(neurons kept, groups kept, positions attended to) for each layer."""
    plan = plan or dense_plan(config)
    for layer, (neurons, groups) in enumerate(zip(plan.neurons, plan.groups, strict=True)):
        length = min(cache_length, config.window(layer) or cache_length)
        yield neurons or config.d_ff, groups or config.num_kv_heads, length


def _local_plan(plan: SparsityPlan | None, mesh: MeshShape) -> SparsityPlan | None:
    """What each device keeps of its own neurons and groups."""
    if plan is None:
        return None
    part = lambda count: None if count is None else -(-count // mesh.model)
    return SparsityPlan(tuple(map(part, plan.neurons)), tuple(map(part, plan.groups)))


def _cache(config: ModelConfig, plan: SparsityPlan | None, batch_size: int, cache_length: int) -> int:
    """Elements of the kept groups' keys and values, and of all groups' new ones."""
    positions = sum(
        groups * length + config.num_kv_heads for _, groups, length in _kept(config, cache_length, plan)
    )
    return 2 * batch_size * config.head_dim * positions


def _attention_weights(config: ModelConfig) -> int:
    """Elements of one layer's projections, biases and query/key norms."""
    D, N, K, H = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    count = 2 * D * H * (N + K)
    count += H * (N + 2 * K) if config.qkv_bias else 0
    count += D if config.out_bias else 0
    return count + (2 * H if config.qk_norm else 0)


def _matrices(config: ModelConfig) -> int:
    return 3 if config.gated_mlp else 2


def _norm(config: ModelConfig) -> int:
    return config.d_model * (2 if config.norm_bias else 1)


def _head(config: ModelConfig, batch_size: int) -> int:
    """Elements of the final norm, the output projection and what the embedding of B tokens reads."""
    width = config.embed_dim or config.d_model
    head = config.vocab_size * width + (_norm(config) if config.final_norm else 0) + batch_size * width
    head += batch_size * config.d_model if config.positions == "learned" else 0
    return head + (2 * config.embed_dim * config.d_model if config.embed_dim else 0)


def _neuron_weights(config: ModelConfig) -> int:
    """Elements of one neuron: its rows and its biases. The down-projection has no bias per neuron."""
    biases = _matrices(config) - 1 if config.mlp_bias else 0
    return _matrices(config) * config.d_model + biases


def _down_bias(config: ModelConfig) -> int:
    return config.d_model if config.mlp_bias else 0


def _default_rank(config: ModelConfig) -> int:
    from polarjax.selection.routers import router_rank  # imports JAX, which sizes alone don't need

    return router_rank(config)


def _router_weights(
    config: ModelConfig, plan: SparsityPlan | None, rank: int, width: Any, *, bias: bool, means: Any
) -> int:
    """Elements of the routers that the plan uses."""
    check_type(means, bool, where="costs: mean_outputs", hint="pass True or False")
    width = whole_number(width, "router_width", where="costs", least=0)
    if plan is None:
        return 0
    D, K = config.d_model, config.num_kv_heads
    groups = sum(count is not None for count in plan.groups)
    neurons = sum(count is not None for count in plan.neurons)
    each = D * K * (2 if means else 1) + (K if bias else 0) + width * (D + K)
    return groups * each + neurons * rank * (D + config.d_ff)
