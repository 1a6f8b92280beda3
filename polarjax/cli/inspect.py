"""`polarjax inspect`: describes a checkpoint or model directory, what fits and what is supported."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from checkpoints_convert import Description, describe_checkpoint
from polarjax import costs
from polarjax.checkpoint.manifest import ROUTERS, describe_routers
from polarjax.checkpoint.reader import ModelReader
from polarjax.checkpoint.writer import is_model_directory
from polarjax.cli.inputs import bytes_of, check_goes_with
from polarjax.configs import ModelConfig
from polarjax.errors import InputError
from polarjax.model.mesh_shape import ONE_DEVICE, Attention, MeshShape
from polarjax.storage.dtypes import check_dtype

MEMORY = 80.0  # default gigabytes of the device
BANDWIDTH = 4200.0  # default gigabytes per second: a copy on an H200
CACHE_LENGTHS = (1024, 4096, 16384, 65536)


def inspect(
    source: Annotated[
        Path, typer.Argument(metavar="PATH", help="A HuggingFace folder, a hub id, or a model directory.")
    ],
    memory: Annotated[float, typer.Option(help="Device memory in gigabytes (10^9 bytes).")] = MEMORY,
    cache_length: Annotated[
        list[int] | None, typer.Option(help="Positions of each sequence; may be given several times.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of weights and cache; default: as stored.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    mesh: Annotated[
        str | None,
        typer.Option(help="Devices that share the model: data=2,model=4. Adds the floor of a step."),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="What the model axis of --mesh divides in attention: groups, or sequences.")
    ] = "groups",
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help=f"With --mesh: a device's memory bandwidth in gigabytes per second. [default: {BANDWIDTH:g}]"
        ),
    ] = None,
) -> dict[str, Any]:
    """Show what a checkpoint is, how many sequences fit, and what is supported; reads no weights."""
    if dtype is not None:
        check_dtype(dtype, where="--dtype")
    rate = BANDWIDTH if bandwidth is None else bandwidth
    for name, value in (("memory", memory), ("bandwidth", rate)):
        if not bytes_of(value, f"--{name}"):
            hint = "give a number such as 80"
            raise InputError(f"no {name}", where=f"--{name}", got=value, expected="more than 0", hint=hint)
    for option, given in (("--attention", attention != "groups"), ("--bandwidth", bandwidth is not None)):
        check_goes_with(option, given, "--mesh", mesh is not None)
    shape = ONE_DEVICE if mesh is None else MeshShape.parse(mesh, attention=cast(Attention, attention))
    if is_model_directory(source):
        result = _model_directory(source, dtype)
    else:
        result = _checkpoint(describe_checkpoint(source, revision=revision, dtype=dtype), dtype)
    config = result.pop("model_config")
    if config is not None:
        shape.check(config, where="--mesh")
        result |= sizes(config, result["dtype"], memory=memory, lengths=cache_length, mesh=shape)
        if mesh is not None:
            result["mesh"] = of_mesh(config, result, shape, rate * 1e9)
    show(result)
    return result


def dry_run(found: Description, dtype: str | None) -> dict[str, Any]:
    """Prints what `convert` would read; raises what it would raise."""
    result = _checkpoint(found, dtype)
    config = result.pop("model_config")
    if config is not None:
        result |= sizes(config, result["dtype"], memory=MEMORY, lengths=None)
    show(result)
    if found.refused:
        raise found.refused[0]
    return result


def supported(config: ModelConfig) -> dict[str, str | None]:
    """What can be skipped: None if it can, otherwise why not."""
    one = "it has a single KV head, and without it no attention is left"
    apart = f"queries share KV heads, {config.q_per_group} each: groups are skipped as a whole"
    alone = "every query has its own KV head: heads are skipped one by one"
    grouped = config.q_per_group > 1
    neurons = f"{config.activation} is never exactly zero; only ReLU is"
    return {
        "dense": None,
        "heads": apart if grouped else (one if config.num_kv_heads == 1 else None),
        "groups": alone if not grouped else (one if config.num_kv_heads == 1 else None),
        "neurons": None if config.neuron_sparsity else neurons,
    }


def of_mesh(config: ModelConfig, found: dict[str, Any], mesh: MeshShape, bandwidth: float) -> dict[str, Any]:
    """What each device of a mesh holds, and the least time of a dense step of the largest batch at each cache length.

    Args:
      config: the model's configuration.
      found: what `sizes` returned for this mesh.
      mesh: the devices.
      bandwidth: of a device's memory, in bytes per second.
    """
    floors = {}
    for length, batch in found["largest_batch"].items():
        if batch:
            call = {"batch_size": batch, "cache_length": length, "dtype": found["dtype"]}
            reading, exchanging = costs.step_floor(config, mesh=mesh, bandwidth=bandwidth, **call)
            floors[length] = {"memory_ms": reading * 1e3, "exchange_ms": exchanging * 1e3}
    return {
        **dataclasses.asdict(mesh),
        "devices": mesh.devices,
        "parameter_bytes_per_device": costs.weights_bytes(config, found["dtype"], mesh=mesh),
        "step_floor": floors,
    }


def sizes(
    config: ModelConfig,
    dtype: str | None,
    *,
    memory: float,
    lengths: Sequence[int] | None,
    mesh: MeshShape = ONE_DEVICE,
) -> dict[str, Any]:
    """Parameters, cache and the largest batch at each cache length, in bytes and sequences.

    Args:
      config: the model's configuration.
      dtype: dtype of weights and cache; None counts as bfloat16.
      memory: memory of each device in gigabytes.
      lengths: cache positions; None takes a few up to the model's maximum.
      mesh: the devices that share the model.
    """
    kind = dtype or "bfloat16"
    usual = [each for each in CACHE_LENGTHS if each < config.max_positions]
    batches = {
        length: costs.largest_batch(config, memory=memory * 1e9, cache_length=length, dtype=kind, mesh=mesh)
        for length in (lengths or [*usual[:3], config.max_positions])
    }
    return {
        "config": config.to_json(),
        "dtype": kind,
        "parameters": costs.weights_bytes(config, kind) // np.dtype(kind).itemsize,
        "parameter_bytes": costs.weights_bytes(config, kind),
        "cache_bytes_per_token": costs.cache_bytes_per_token(config, kind),
        "memory_bytes": int(memory * 1e9),
        "largest_batch": batches,
        "supported": {name: why is None for name, why in supported(config).items()},
        "not_supported": {name: why for name, why in supported(config).items() if why is not None},
    }


def _checkpoint(found: Description, dtype: str | None) -> dict[str, Any]:
    return {
        "path": found.path,
        "kind": "HuggingFace checkpoint",
        "model_type": found.model_type,
        "model_config": found.config,
        "files": list(found.files),
        "tensors": found.tensors,
        "stored_bytes": found.num_bytes,
        "dtype": dtype or found.dtype,
        "refused": [str(error) for error in found.refused],
    }


def _model_directory(path: Path, dtype: str | None) -> dict[str, Any]:
    reader = ModelReader(path)
    heads = describe_routers(reader.folder / ROUTERS)
    return {
        "path": reader.folder,
        "kind": "model directory",
        "model_type": reader.model_type,
        "model_config": reader.config,
        "stored_bytes": reader.num_bytes(),
        "dtype": dtype or reader.dtype.name,
        "routers": heads is not None,
        "heads": heads,
        "plans": (reader.folder / "plans.json").is_file(),
        "refused": [],
    }


def show(result: dict[str, Any]) -> None:
    """Prints the result as a table."""
    for name, text in _rows(result):
        print(f"{name:<12}{text}")


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("path", f"{result['path']} ({result['kind']}{_stored(result)})")]
    rows += [("family", result["model_type"] or "not supported")]
    if "config" in result:
        config = ModelConfig.from_json(result["config"])
        gb = result["parameter_bytes"] / 1e9
        batches = [
            f"{batch:,} sequences of {length:,} tokens" for length, batch in result["largest_batch"].items()
        ]
        memory = f"{result['memory_bytes'] / 1e9:g} GB" + " a device" * ("mesh" in result)
        rows += [
            ("shape", _shape(config)),
            ("parameters", f"{result['parameters']:,}, {gb:,.2f} GB as {result['dtype']}"),
            ("cache", f"{result['cache_bytes_per_token']:,} bytes per token"),
            ("fits", f"in {memory}: {', or '.join(batches)}"),
            *_mesh_rows(result.get("mesh")),
            ("supported", ", ".join(name for name, yes in result["supported"].items() if yes)),
        ]
        rows += [("not", f"{name}: {why}") for name, why in result["not_supported"].items()]
    if "routers" in result:
        rows += [("learned", _learned(result))]
    return rows + [("refused", why) for why in result["refused"] or ["nothing"]]


def _mesh_rows(mesh: dict[str, Any] | None) -> list[tuple[str, str]]:
    if mesh is None:
        return []
    each = f"{mesh['parameter_bytes_per_device'] / 1e9:,.2f} GB of weights each"
    how = f"attention by {mesh['attention']}; " if mesh["model"] > 1 else ""
    rows = [("mesh", f"{mesh['devices']} devices (data={mesh['data']}, model={mesh['model']}); {how}{each}")]
    floors = [
        f"{floor['memory_ms']:.2f} + {floor['exchange_ms']:.2f} ms at {length:,}"
        for length, floor in mesh["step_floor"].items()
    ]
    text = "; ".join(floors)
    return rows + (
        [("step", f"dense, at least (memory + exchanges, most sequences): {text}")] if floors else []
    )


def _stored(result: dict[str, Any]) -> str:
    if result["stored_bytes"] is None:
        return ", weights not read"
    count = len(result.get("files", ()))
    files = f"{count} weights file{'s' * (count > 1)}, " if count else ""
    return f", {files}{result['stored_bytes'] / 1e9:,.2f} GB"


def _learned(result: dict[str, Any]) -> str:
    found = [name for name in ("routers", "plans") if result[name]]
    if not found:
        return "nothing yet: polarjax sparsify"
    return " and ".join(found) + (_of_heads(result["heads"]) if result["heads"] else "")


def _of_heads(heads: dict[str, Any]) -> str:
    skipped = "their mean outputs" if heads["mean_outputs"] else "zeros"
    layer = f" through a hidden layer of {heads['router_width']}" if heads["router_width"] else ""
    return f"; heads are ranked by {heads['importance']}{layer}, skipped ones replaced by {skipped}"


def _shape(config: ModelConfig) -> str:
    gate = "gated " if config.gated_mlp else ""
    windows = {config.window(layer) for layer in range(config.num_layers)} - {None}
    window = f", window {'/'.join(map(str, sorted(filter(None, windows))))}" if windows else ""
    above = f" above {config.activation_threshold:g}" * bool(config.activation_threshold)
    return (
        f"{config.num_layers} layers of width {config.d_model}; {config.num_heads} query and "
        f"{config.num_kv_heads} KV heads of width {config.head_dim}; {config.d_ff} neurons, {gate}"
        f"{config.activation}{above}; {config.vocab_size} tokens; {config.max_positions} positions{window}"
    )
