"""Selective MLP on Hopper (Pallas Mosaic GPU): two products over gathered rows, in one kernel or two.

Prepares the operands, launches the kernels that `block` describes and, with two kernels, adds up the partial sums.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import _device
from pallas_kernels.sparse_mlp.mosaic import gather
from pallas_kernels.sparse_mlp.mosaic.block import Block
from pallas_kernels.sparse_mlp.mosaic.call import Call
from pallas_kernels.sparse_mlp.mosaic.consumer import consume
from pallas_kernels.sparse_mlp.mosaic.hidden import ACTIVATIONS, activation
from pallas_kernels.sparse_mlp.mosaic.loader import load
from pallas_kernels.sparse_mlp.mosaic.producer import produce
from pallas_kernels.sparse_mlp.schedule import Split
from pallas_kernels.sparse_mlp.tiles import BATCHES, HIDDEN_WIDTH, PADDING, Tiles, heuristic

COMPILER = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,  # Warpgroup semantics cannot slice padded rows
    unsafe_no_auto_barriers=True,
    approx_math=True,
)


# Jitted so that all layers of a model share one trace, one lowering and one binary.
@functools.partial(jax.jit, static_argnames=("activation", "threshold", "device", "tiles", "interpret"))
def sparse_mlp(
    x: Float[Array, "B D"],
    w_up: Float[Array, "F D"],
    w_down: Float[Array, "F D"],
    index: Int[Array, " k"],
    *,
    w_gate: Float[Array, "F D"] | None = None,
    b_up: Float[Array, " F"] | None = None,
    b_gate: Float[Array, " F"] | None = None,
    activation: str,
    threshold: float = 0.0,
    device: _device.Device,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B D"]:
    """See `pallas_kernels.sparse_mlp`; bfloat16 or float16 only, and D a multiple of 128.

    Args:
      tiles: the configuration, whose batch is at least B; None uses the heuristic's.
      interpret: run in Pallas's GPU interpreter on the CPU; requires `tiles.copy == "rows"`.

    Raises:
      NotImplementedError: the kernels cannot do this call.
    """
    if not interpret:
        _device.require_hopper(device)
    _require(x, w_up, activation)
    if x.shape[0] > BATCHES[-1]:
        options = {"w_gate": w_gate, "b_up": b_up, "b_gate": b_gate, "activation": activation}
        options |= {"threshold": threshold, "device": device, "tiles": tiles, "interpret": interpret}
        return _in_pieces(x, lambda piece: sparse_mlp(piece, w_up, w_down, index, **options))
    gated = w_gate is not None
    if tiles is None:
        tiles = heuristic(x.shape[0], x.shape[1], device, selected=index.shape[0], gated=gated)
    num_neurons, d_model = w_up.shape
    sizes = {"batch": x.shape[0], "d_model": d_model, "num_neurons": num_neurons, "selected": index.shape[0]}
    call = Call(
        **sizes, gated=gated, activation=activation, threshold=threshold, dtype=x.dtype.name, tiles=tiles
    )
    operands = {"x": jnp.pad(x, ((0, tiles.batch - x.shape[0]), (0, 0))), "index": index.astype(jnp.int32)}
    optional = {"w_gate": w_gate, "b_up": b_up, "b_gate": b_gate}
    operands |= {"w_up": w_up, "w_down": w_down} | {n: a for n, a in optional.items() if a is not None}
    if tiles.copy == "rows":
        operands |= _for_rows(call, operands["index"])
    return _run(call, operands, interpret)


def _in_pieces(x: jax.Array, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[B D] -> [B D], in pieces of the largest supported batch.

    A loop, so that no two pieces run at once: the thread blocks of a fused kernel wait for each other, so two kernels
    that each occupied part of the GPU would wait forever.
    """
    batch, width = x.shape
    pieces = jnp.pad(x, ((0, -batch % BATCHES[-1]), (0, 0))).reshape(-1, BATCHES[-1], width)
    return lax.map(run, pieces).reshape(-1, width)[:batch]


def _require(x: jax.Array, w_up: jax.Array, activation: str) -> None:
    if x.dtype != w_up.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"needs bfloat16 or float16 throughout; got {x.dtype} and {w_up.dtype}")
    if x.shape[1] % 128:
        raise NotImplementedError(f"needs a model width that is a multiple of 128; got {x.shape[1]}")
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"supports the activations {', '.join(ACTIVATIONS)}; got {activation}")


def _for_rows(call: Call, index: jax.Array) -> dict[str, jax.Array]:
    """Operands for Pallas's own copies: the index padded to whole tiles, -1 where absent, and zeros to copy there."""
    index = jnp.where((index >= 0) & (index < call.num_neurons), index, -1)
    index = jnp.pad(index, (0, call.padded - index.shape[0]), constant_values=-1)
    return {"index": index, "zeros": jnp.zeros((call.tiles.cols,), call.dtype)}


def _scratch(call: Call, has_up: bool, has_down: bool) -> dict[str, Any]:
    tiles, dtype = call.tiles, call.dtype
    tiling, swizzled = (cast(Any, kind) for kind in (plgpu.TilingTransform, plgpu.SwizzleTransform))
    swizzle = min(128, 2 * tiles.batch)
    ring = plgpu.SMEM((tiles.stages, tiles.rows, tiles.cols + PADDING), dtype)
    wide = (tiling((8, 64)), swizzled(128))
    x_ring = plgpu.SMEM((tiles.x_slots, tiles.batch, tiles.x_cols), dtype, transforms=wide)
    narrow = (tiling((8, swizzle // 2)), swizzled(swizzle))
    shape = (tiles.hidden_slots, tiles.warpgroups, 64, tiles.batch)
    h_ring = plgpu.SMEM(shape, dtype, transforms=narrow)

    def barriers(count, arrivals=1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    rows = tiles.copy == "rows"
    full = barriers(tiles.stages, tiles.rows) if rows else plgpu.SMEM((2 * tiles.stages,), jnp.int32)
    scratch = {"w_ring": ring, "full": full, "empty": barriers(tiles.stages, tiles.warpgroups)}
    operands = [x_ring, h_ring]
    if has_up and has_down:
        width = min(tiles.batch, HIDDEN_WIDTH)
        transforms = (tiling((8, width)), swizzled(2 * width))
        stage = plgpu.SMEM((64, width), dtype, transforms=transforms)
        if tiles.marked:  # not shared: the first hidden values arrive while this block still computes its own
            scratch["h_stage"] = stage
        else:
            operands.append(stage)
    if tiles.marked:
        scratch["marked"] = barriers(1)
    scratch["operand"] = plgpu.RefUnion(*operands)
    if has_up:
        scratch |= {"x_full": barriers(tiles.x_slots), "x_empty": barriers(tiles.x_slots, tiles.warpgroups)}
        scratch["bias"] = plgpu.SMEM((tiles.warpgroups, call.bias_parts, 64 * tiles.groups), jnp.float32)
    if has_down:
        count = tiles.hidden_slots
        scratch |= {"h_full": barriers(count), "h_empty": barriers(count, tiles.warpgroups)}
    return scratch


def products(call: Call, operands: dict[str, jax.Array], interpret: bool = False) -> dict[str, jax.Array]:
    """Runs the products whose operands are given; returns their partial sums by name."""
    tiles = call.tiles
    has_up, has_down = "x" in operands, "w_down" in operands
    outputs = {}
    if has_up:
        outputs["up_parts"] = jax.ShapeDtypeStruct(call.up_parts, jnp.float32)
    if has_up and has_down:
        outputs["hidden"] = jax.ShapeDtypeStruct(call.hidden, jnp.dtype(call.dtype))
    if has_down:
        outputs["down_parts"] = jax.ShapeDtypeStruct(call.down_parts, jnp.dtype(call.kind))
    if has_up and has_down:
        outputs["out"] = jax.ShapeDtypeStruct((call.batch, call.d_model), jnp.dtype(call.dtype))
        if tiles.marked:
            outputs["early"] = jax.ShapeDtypeStruct(call.early, jnp.dtype(call.dtype))
    scratch = _scratch(call, has_up, has_down)
    names = [*operands, *outputs, *scratch]

    def body(*references):
        refs = dict(zip(names, references, strict=True))
        refs |= dict(zip(("x_ring", "h_ring", "h_stage"), refs.pop("operand"), strict=False))
        if has_up and has_down:
            refs["arrived"] = pl.get_global(plgpu.SemaphoreType.REGULAR((call.semaphores,)))
        if tiles.copy != "rows":
            gather.init_barriers(tiles.stages)(refs["full"])
        block = Block(call, refs, interpret)
        warpgroup = lax.axis_index("warpgroup")

        pl.when(warpgroup < tiles.warpgroups)(lambda: consume(block, warpgroup))
        pl.when(warpgroup == tiles.warpgroups)(lambda: produce(block))
        pl.when(warpgroup == tiles.warpgroups + 1)(lambda: load(block))

    kernel = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        grid=(call.grid,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 2,
        thread_name="warpgroup",
        scratch_types=list(scratch.values()),
        compiler_params=COMPILER,
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="_".join(["sparse_mlp", *(["up"] * has_up), *(["down"] * has_down)]),
    )
    return dict(zip(outputs, kernel(*operands.values()), strict=True))


def _sum_parts(parts: jax.Array, split: Split) -> jax.Array:
    """[tiles ...]: adds up the partial sums of each tile, in order."""

    def pick(numbers):
        chosen = parts.at[np.maximum(numbers, 0)].get(mode="promise_in_bounds")
        return jnp.where((numbers >= 0).reshape((-1,) + (1,) * (parts.ndim - 1)), chosen, 0.0)

    first, *others = split.contributions.T
    return functools.reduce(lambda total, numbers: total + pick(numbers), others, pick(first))


def _hidden(call: Call, up_parts: jax.Array) -> jax.Array:
    """Hidden values [blocks of 64 neurons, 64, batch] from the partial sums of the up-projection."""
    total = _sum_parts(up_parts, call.up)  # [matrices · row_tiles, groups, 64, batch]
    total = total.reshape((2 if call.gated else 1, -1, 64, call.tiles.batch))
    act = activation(call)
    hidden = act(total[1]) * total[0] if call.gated else act(total[0])
    return hidden[: call.hidden[0]].astype(call.dtype)


def _run(call: Call, operands: dict[str, jax.Array], interpret: bool = False) -> jax.Array:
    """[B D] from x [batch D], index [k], w_up, w_down [F D] and the optional w_gate, b_up, b_gate."""
    if call.tiles.fused:
        return products(call, operands)["out"]
    up = {name: array for name, array in operands.items() if name != "w_down"}
    down = {name: operands[name] for name in ("index", "w_down", "zeros") if name in operands}
    up_parts = products(call, up, interpret)["up_parts"]
    parts = products(call, {**down, "hidden": _hidden(call, up_parts)}, interpret)["down_parts"]
    total = _sum_parts(parts, call.down).reshape(-1, call.tiles.batch, 64)
    total = total.transpose(1, 0, 2).reshape(call.tiles.batch, call.d_model)
    return total[: call.batch].astype(call.dtype)
