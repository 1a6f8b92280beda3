"""The programs that the engine sends to the device, jitted."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from polarjax.engine import slots
from polarjax.generation.overlap import overlapping_jit
from polarjax.model.decoder import Decoder
from polarjax.types import Array, Bool

make = jax.jit(slots.make_slots, static_argnums=(1, 2), keep_unused=True)
read = jax.jit(slots.read, donate_argnames=("slots",))
share = jax.jit(slots.share, donate_argnames=("slots",))
decode = overlapping_jit(
    slots.decode, static_argnames=("steps", "implementation"), donate_argnames=("slots",)
)


def compile_all(
    model: Decoder,
    made: slots.Slots | None,
    readings: Iterable[slots.Reading],
    halted: Bool[Array, "B"],
    chunks: Iterable[dict[str, Any]],
) -> None:
    """Compiles `read` for each of `readings`, and `decode` with the options of each of `chunks`.

    They are compiled side by side, on as many threads as there are processors. Calls find what was compiled.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reads = [pool.submit(read.lower(model, made, each).compile) for each in readings]
        steps = [pool.submit(decode.lower(model, made, halted, **each).compile) for each in chunks]
        for compiled in (*reads, *steps):
            compiled.result()
