"""`polarjax serve`: answer requests over HTTP, in the shapes of OpenAI's interface."""

import gc
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from polarjax.cli.decoding_options import Attention, Dense, Dtype, HeadDensity, Mesh
from polarjax.cli.inputs import bytes_of, placement
from polarjax.errors import InputError

KEY_VARIABLE = "POLARJAX_API_KEY"

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.")]
Name = Annotated[str | None, typer.Option(help="Name of the model; default: the folder's.")]
SlotCount = Annotated[
    int | None, typer.Option(help="Requests that run at a time; default: as many as fit into the memory.")
]
Capacity = Annotated[
    int | None, typer.Option(help="Tokens of a prompt and its answer; default: the model's, at most 4096.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(help=f"Key that clients must send; ${KEY_VARIABLE} keeps it out of the list of processes."),
]
MaxBody = Annotated[float, typer.Option(help="Largest body of a request, in megabytes.")]
MaxPrompt = Annotated[int | None, typer.Option(help="Most tokens of a prompt; default: what a slot holds.")]
MaxWaiting = Annotated[int, typer.Option(help="Most sequences that wait for a slot; more are refused (429).")]


def serve(
    folder: Annotated[Path, typer.Argument(help="A model directory.")],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    slots: SlotCount = None,
    capacity: Capacity = None,
    dense: Dense = False,
    head_density: HeadDensity = None,
    dtype: Dtype = None,
    mesh: Mesh = None,
    attention: Attention = None,
    api_key: ApiKey = None,
    max_body_mb: MaxBody = 4,
    max_prompt: MaxPrompt = None,
    max_waiting: MaxWaiting = 256,
) -> dict[str, Any]:
    """Serve a model at /v1/completions and /v1/chat/completions, sparse where it has routers, dense otherwise.

    Ctrl-C or SIGTERM finishes what runs and refuses what is new; a second one ends at once.
    """
    from polarjax.serving import server

    server.check_installed()
    api_key = _key(api_key)
    from polarjax.checkpoint.loading import load_with_tokenizer
    from polarjax.engine.engine import Engine
    from polarjax.numeric import whole_number
    from polarjax.serving.service import Limits, Service

    limits = Limits(
        body=_body_bytes(max_body_mb),
        prompt=None if max_prompt is None else whole_number(max_prompt, "max_prompt", where="--max-prompt"),
        waiting=whole_number(max_waiting, "max_waiting", where="--max-waiting", least=0),
    )
    with server.listen_on(host, port) as listening:
        bundle, _ = load_with_tokenizer(folder, dtype, **placement(mesh, attention))
        for note in bundle.generation.notes:
            print(note, file=sys.stderr)
        engine = Engine(bundle, slots=slots, capacity=capacity, dense=dense, head_density=head_density)
        service = Service(bundle, engine, name=name or folder.absolute().name, limits=limits)
        engine.warm_up()
        gc.freeze()  # what compiling left: collecting it would stop all requests for most of a second
        if api_key is None and not server.is_loopback(listening):
            print("polarjax: everybody who reaches this address can use it; --api-key KEY", file=sys.stderr)
        address, started = server.address_of(listening), time.perf_counter()
        size = f"{engine.slots} slot{'s' * (engine.slots != 1)} of {engine.capacity:,} tokens"
        line = f"polarjax: {service.model.name} at {address} ({size})"
        server.run(service, listening, api_key=api_key, ready=lambda: print(line, flush=True))
    metrics = service.metrics
    return {
        "address": address,
        "seconds": time.perf_counter() - started,
        "sequences": dict(metrics.finished),
        "prompt_tokens": metrics.prompt_tokens,
        "generated_tokens": metrics.generated_tokens,
    }


def _body_bytes(megabytes: float) -> int:
    """The bytes of `--max-body-mb`; raises `InputError` if no body has so few."""
    where = "--max-body-mb"
    size = bytes_of(megabytes, where, "megabytes")
    if not size:
        hint = "give a number such as 4"
        raise InputError("no body is so small", where=where, got=megabytes, expected="more than 0", hint=hint)
    return size


def _key(given: str | None) -> str | None:
    """The key of the option or else of the environment; raises `InputError` if it is empty or can't be sent."""
    where = "--api-key" if given is not None else KEY_VARIABLE
    key = given if given is not None else os.environ.get(KEY_VARIABLE)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise InputError(
            "unusable API key",
            where=where,
            got="an empty one" if not key else "one that no header can hold",
            expected="printable ASCII",
            hint=f"set it, or leave both --api-key and {KEY_VARIABLE} out to let everybody in",
        )
    return key
