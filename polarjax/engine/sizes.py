"""How many slots, and of what capacity, fit next to the model."""

import jax

from polarjax import costs, memory
from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model.chunk_attention import KEY_BLOCK, SCORES_BYTES
from polarjax.model.mesh_shape import ONE_DEVICE, MeshShape
from polarjax.numeric import whole_number
from polarjax.types import DTypeLike

CAPACITY = 4096
"""Most positions of a slot if the caller doesn't say."""

_WITHOUT_LIMIT = 8  # slots where the device doesn't report its memory
_MOST = 256
_USED = 0.95  # of the memory that is left; fragments and small arrays take the rest


def slots_and_capacity(
    config: ModelConfig,
    dtype: DTypeLike,
    slots: int | None,
    capacity: int | None,
    *,
    read_tokens: int,
    mesh: MeshShape = ONE_DEVICE,
) -> tuple[int, int]:
    """The given sizes, or those that the memory of each device allows; the capacity is a multiple of 8.

    No sequence is longer than the model's positions, so a larger capacity is lowered to them.

    Raises:
      InputError: a size isn't a positive whole number, or the slots don't fit.
    """
    slots = None if slots is None else whole_number(slots, "slots", where="Engine")
    if capacity is not None:
        capacity = whole_number(capacity, "capacity", where="Engine")
    parts = mesh.batch_parts
    if slots is not None:
        mesh.rows(slots, where="Engine: slots")
    available = _available(config, dtype, read_tokens, mesh)
    if capacity is None:
        capacity = min(config.max_positions, CAPACITY)
        if slots is not None and available is not None:
            each = slots * costs.cache_bytes_per_token(config, dtype) // mesh.devices
            weights = costs.weights_bytes(config, dtype, mesh=mesh)
            left = int(available - weights) - slots * 4 * config.vocab_size // mesh.devices
            capacity = max(8, min(capacity, left // each // 8 * 8))
    capacity = -(-min(capacity, config.max_positions) // 8) * 8
    if available is None:
        slots = slots or -(-_WITHOUT_LIMIT // parts) * parts
        if jax.default_backend() == "cpu" and (whole := memory.host_memory()) is not None:
            fitting = costs.largest_batch(config, memory=whole, cache_length=capacity, dtype=dtype)
            _check_fit(slots, fitting // parts * parts, capacity, "the machine's memory")
        return slots, capacity
    fitting = costs.largest_batch(config, memory=available, cache_length=capacity, dtype=dtype, mesh=mesh)
    _check_fit(slots or parts, fitting, capacity, "the device's memory")
    return slots or min(fitting, max(_MOST // parts, 1) * parts), capacity


def _check_fit(slots: int, fitting: int, capacity: int, memory: str) -> None:
    if slots > fitting:
        raise InputError(
            f"the slots do not fit into {memory}",
            where="Engine",
            got=f"{slots:,} of {capacity:,} positions",
            expected=f"at most {fitting:,} of that capacity",
            hint="lower slots or capacity, or use a narrower dtype",
        )


def _available(config: ModelConfig, dtype: DTypeLike, read_tokens: int, mesh: MeshShape) -> float | None:
    """Bytes for weights and slots; None if the device doesn't report its memory."""
    limit = memory.device_memory()
    if limit is None:
        return None
    weights = costs.weights_bytes(config, dtype, mesh=mesh)
    others = max(0, memory.held_bytes() - weights)
    scores = 3 * min(SCORES_BYTES, read_tokens * 4 * config.num_heads * KEY_BLOCK)
    activations = read_tokens * 4 * (3 * config.d_ff + 8 * config.d_model)
    return _USED * (limit - others) - scores - activations


def plan_sizes(slots: int) -> list[int]:
    """Numbers of rows in use that have a plan, and a program, of their own: a few from 1 to `slots`."""
    sizes = {slots}
    while (smallest := min(sizes)) > 1:
        sizes.add(-(-smallest // 4))
    return sorted(sizes)
