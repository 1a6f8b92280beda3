"""Decoding steps on several devices of one host, beside the same steps on one: `bench_decode table --devices 1 2`.

Weights, routers and caches are random and made on the devices that hold them.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import polarjax as pj
from bench import bench_decode, timing
from bench.models import DecodeShape, shape_of
from bench.random_models import random_model
from bench.random_models import routers as random_routers
from polarjax import costs, memory
from polarjax.demo.run import PROMPTS
from polarjax.model.mesh_shape import MeshShape
from polarjax.model.parameters import parameters, with_parameters
from polarjax.selection.routers import Routers
from polarjax.selection.selectors import Sparsity

COLUMNS = (
    *("case", "kind", "mesh", "ms_per_step", "tokens_per_s", "speedup_vs_dense", "speedup_vs_one"),
    *("pct_of_floor", "exchange_pct", "compile_s"),
)
_REPEATS = 1  # runs of a loop that are profiled
_CHECKED = 8  # sequences that are checked


def _meshes(args: argparse.Namespace) -> Iterator[MeshShape]:
    """The meshes that are asked for; may repeat."""
    for devices in args.devices:
        if "data" in args.axes:
            yield MeshShape(data=devices)
        if "model" in args.axes:
            yield from (MeshShape(model=devices, attention=each) for each in args.attention if devices > 1)
            yield from [MeshShape()] if devices == 1 else []


def ways(args: argparse.Namespace, shape: DecodeShape) -> list[MeshShape]:
    """The meshes that are asked for, each once; raises `InputError` if one doesn't divide the shape."""
    found = list(dict.fromkeys(_meshes(args)))
    for mesh in found:
        mesh.check(shape.config, where=shape.name)
    return found


def device_mesh(mesh: MeshShape) -> jax.sharding.Mesh:
    """The mesh of the first devices."""
    axes, devices = (jax.sharding.AxisType.Auto,) * 2, jax.devices()[: mesh.devices]
    return jax.make_mesh((mesh.data, mesh.model), ("data", "model"), axis_types=axes, devices=devices)


def fitting(shape: DecodeShape, mesh: MeshShape, batches: Sequence[int] | None) -> list[int]:
    """The batch sizes of one index of `data` that fit; 0 stands for the largest that fits, rounded down to 16."""
    limit, found = memory.device_memory(), []
    for batch in batches or shape.batches:
        if batch == 0 and limit is not None:
            room: dict[str, Any] = {
                "memory": limit - shape.memory(0, mesh) + costs.weights_bytes(shape.config, mesh=mesh)
            }
            most = costs.largest_batch(shape.config, mesh=mesh, cache_length=shape.cache, **room)
            batch = most // mesh.data // 16 * 16
        needed = shape.memory(batch * mesh.data, mesh)
        if limit is not None and needed > limit:
            print(
                f"{shape.name} B{batch} on {mesh} needs {needed / 1e9:.0f} GB of {limit / 1e9:.0f}",
                flush=True,
            )
        elif batch:
            found.append(batch)
    return found


@dataclasses.dataclass(frozen=True)
class Placed:
    """A published shape on a mesh.

    Attributes:
      shape: the model.
      mesh: sizes of the mesh.
      layout: how the model lies on the devices; None on one.
      model, routers: with random values.
    """

    shape: DecodeShape
    mesh: MeshShape
    layout: pj.Layout | None
    model: pj.Decoder
    routers: Routers

    @classmethod
    def of(cls, shape: DecodeShape, mesh: MeshShape) -> "Placed":
        """Makes the model and its routers on the first devices."""
        if mesh.devices == 1:
            return cls(shape, mesh, None, random_model(shape.config), random_routers(shape.config))
        layout = pj.Layout(device_mesh(mesh), attention=mesh.attention)
        made = random_model(shape.config, layout), random_routers(shape.config, layout)
        return cls(shape, mesh, layout, *made)

    @property
    def _where(self) -> dict[str, Any]:
        """Shardings of a cache's values and lengths."""
        if self.layout is None:
            return {"where": None, "rows": None}
        layout = self.layout
        return {
            "where": layout.sharding(layout.cache_spec()),
            "rows": layout.sharding(jax.P(layout.data)),
        }

    def filled_cache(self, batch: int) -> pj.KVCache:
        """A cache of random values with room left for the timed steps, where the model writes it."""
        return bench_decode.filled_cache(self.shape.config, batch, self.shape.cache, **self._where)

    def kinds(self, batch: int) -> Iterator[tuple[str, Sparsity | None]]:
        """(name, sparsity) of each kind of step compared at one batch size, without plans that skip nothing."""
        yield "dense", None
        for neurons in (False, True) if self.shape.neuron_density else (False,):
            plan = self.shape.plan(batch, neurons=neurons, mesh=self.mesh)
            rows = batch // self.mesh.data
            name = self.shape.kind(rows) if neurons else f"heads {self.shape.head_density:g}"
            if any((*plan.neurons, *plan.groups)):
                yield name, Sparsity(self.routers, plan)
            else:
                print(f"{self.shape.name} on {self.mesh}: {name} leaves nothing to skip", flush=True)

    def lowered(self, batch: int, sparsity: Sparsity | None, options: dict[str, Any]) -> Any:
        """The loop of steps for this batch and these compiler options, lowered."""
        config, where = self.shape.config, self._where
        side = (batch, config.num_kv_heads, self.shape.cache, config.head_dim)
        value: Any = jax.ShapeDtypeStruct(side, jnp.bfloat16, sharding=where["where"])
        rows: Any = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=where["rows"])
        values = (value,) * config.num_layers
        cache = pj.KVCache(values, values, rows)
        return bench_decode.steps_jit({}, options).lower(self.model, rows, cache, sparsity, rows)


class Checked(NamedTuple):
    """A model to check: as it is on one device and in float32, and prompts."""

    name: str
    model: pj.Decoder
    exact: pj.Decoder
    prompts: tuple[jax.Array, jax.Array]


def _wide() -> Iterator[Checked]:
    """Random models wide enough for the kernel that sums, and of a dtype that it takes."""
    sizes = {
        "num_layers": 2,
        "d_model": 1024,
        "d_ff": 2048,
        "num_heads": 8,
        "num_kv_heads": 8,
        "vocab_size": 4096,
    }
    for shape in map(shape_of, ("opt-6.7b", "llama-2-7b")):
        model = random_model(dataclasses.replace(shape.config, **sizes))
        flat = {name: value.astype(jnp.float32) for name, value in parameters(model).items()}
        rng, lengths = np.random.default_rng(0), np.arange(_CHECKED, dtype=np.int32) % 7 + 2
        tokens = rng.integers(4, sizes["vocab_size"], (_CHECKED, 8)).astype(np.int32)
        prompts = jnp.asarray(tokens), jnp.asarray(lengths)
        yield Checked(f"{shape.name} 2 x 1024 bfloat16", model, with_parameters(model.config, flat), prompts)


def _bundled() -> Iterator[Checked]:
    for name, dtype in itertools.product(("opt-6m", "llama-6m"), ("float16", "bfloat16")):
        bundle, exact = bench_decode.bundled(name, dtype), bench_decode.bundled(name, "float32")
        assert bundle.tokenizer is not None
        prompts = tuple(map(jnp.asarray, bundle.tokenizer.encode((PROMPTS * _CHECKED)[:_CHECKED])))
        yield Checked(f"{name} {dtype}", bundle.model, exact.model, (prompts[0], prompts[1]))


def run_checks(args: argparse.Namespace) -> bool:
    """Prints one line per case: whether models on several devices predict the same tokens as on one.

    Errors are those against float32 on one device; see `bench_decode.verdict`. Up to 8 sequences, so as many devices.
    """
    fine = True
    for checked in itertools.chain(_wide(), _bundled()):
        for mesh in dict.fromkeys(_meshes(args)):
            if mesh.devices > 1 and checked.model.config.num_kv_heads % mesh.model == 0:
                for kind in ("dense", "sparse"):
                    fine &= _check(checked, kind, mesh)
    return fine


def _check(checked: Checked, kind: str, mesh: MeshShape) -> bool:
    model, prompts = checked.model, checked.prompts
    sparsity = None if kind == "dense" else bench_decode.fixed(model.config, mesh)
    write = functools.partial(pj.generate, max_new_tokens=bench_decode.NEW, sparsity=sparsity)
    tokens = jnp.asarray(np.asarray(write(model, *prompts).tokens))
    follow = functools.partial(bench_decode.logits, prompts=prompts, follow=tokens, sparsity=sparsity)
    many = pj.shard(model, device_mesh(mesh), attention=mesh.attention)
    made = write(many, *prompts).tokens
    found = follow(checked.exact), follow(many), follow(model)
    fine, text = bench_decode.verdict(*found, most=1.5)  # devices round their parts before these are summed
    equal = (np.asarray(made) == np.asarray(tokens)).mean()
    print(
        f"{'ok  ' if fine else 'FAIL'} {checked.name} {kind} on {mesh}: {equal:.1%} of the tokens equal; "
        f"{text.format('one device')}",
        flush=True,
    )
    return fine


def table(args: argparse.Namespace, peak: float | None) -> Iterator[dict[str, Any]]:
    """One row per case, kind and mesh, those of one device first; stops early when time runs out."""
    deadline = time.monotonic() + args.seconds
    for shape in map(shape_of, args.models):
        alone: dict[tuple[int, str], float] = {}
        for mesh in ways(args, shape):
            for batch, row in _rows(shape, mesh, args.batches, peak, dict(args.option)):
                if mesh.devices == 1:
                    alone[batch, row["kind"]] = row["tokens_per_s"]
                one = alone.get((batch, row["kind"]))
                yield row | {"speedup_vs_one": one and row["tokens_per_s"] / one}
                if time.monotonic() > deadline:
                    print("out of time", flush=True)
                    return


def _rows(
    shape: DecodeShape,
    mesh: MeshShape,
    batches: Sequence[int] | None,
    peak: float | None,
    tried: dict[str, Any],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The batch of one index of `data`, and a row, for each batch and kind on one mesh; `tried`: compiler options."""
    fits = fitting(shape, mesh, batches)
    if not fits:
        return
    placed, alone = Placed.of(shape, mesh), mesh.devices == 1
    options = lambda batch: {**(pj.loop_options(batch) if alone else pj.OVERLAP), **tried}
    todo = [(batch, *kind) for batch in fits for kind in placed.kinds(batch * mesh.data)]
    loops = bench_decode.compiled(
        placed.lowered(batch * mesh.data, sparsity, options(batch)) for batch, _, sparsity in todo
    )
    for batch, of in itertools.groupby(zip(todo, loops, strict=True), key=lambda each: each[0][0]):
        cache, dense = placed.filled_cache(batch * mesh.data), None
        for (_, kind, sparsity), (loop, compiling) in of:
            median, spread, cache = bench_decode.seconds_per_step(loop, placed.model, cache, sparsity)
            share, cache = exchange_share(loop, placed.model, cache, sparsity)
            dense = dense or median
            length, plan = shape.cache - bench_decode.STEPS // 2, None if sparsity is None else sparsity.plan
            yield (
                batch,
                {
                    "case": f"{shape.name} B{batch * mesh.data} S{shape.cache}",
                    "kind": bench_decode.with_options(kind, tried),
                    "mesh": f"data={mesh.data} model={mesh.model} {mesh.attention if mesh.model > 1 else ''}".strip(),
                    "devices": mesh.devices,
                    "data": mesh.data,
                    "model": mesh.model,
                    "attention": mesh.attention,
                    **shape.times(batch * mesh.data, length, median, peak, plan, mesh),
                    "exchange_pct": share,
                    "spread_ms": spread * 1e3,
                    "speedup_vs_dense": dense / median,
                    "compile_s": compiling,
                },
            )
        del cache


def exchange_share(
    loop: Any, model: pj.Decoder, cache: pj.KVCache, sparsity: Sparsity | None
) -> tuple[float | None, pj.KVCache]:
    """Percent of the first GPU's busy time in collectives, waiting included, and the cache.

    None instead on one device or without a GPU.
    """
    start = cache.length
    if len(start.devices()) == 1 or next(iter(start.devices())).platform != "gpu":
        return None, cache
    token, kept = jax.device_put(np.zeros(start.shape, np.int32), start.sharding), [cache]

    def run() -> jax.Array:
        given = kept.pop()
        last, after = loop(
            model, token, pj.KVCache(given.k, given.v, jnp.copy(start)), sparsity, jnp.copy(start)
        )
        kept.append(pj.KVCache(after.k, after.v, start))
        return last

    seen = timing.events(run, _REPEATS)
    exchanging = [e for e in seen if any(name in e.name.lower() for name in ("nccl", "all_reduce_norm"))]
    return 100 * timing.busy(exchanging) / timing.busy(seen), kept.pop()
