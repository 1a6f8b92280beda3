"""The programs that the engine sends to the device, jitted."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from polarjax.engine import slots
from polarjax.generation.checks import check_not_traced
from polarjax.generation.overlap import overlapping_jit
from polarjax.model.flat import Flat, of_flat
from polarjax.model.readable import readable
from polarjax.types import Array, Bool

make = jax.jit(of_flat(slots.make_slots), static_argnums=(1, 2), keep_unused=True)
read = jax.jit(of_flat(slots.read), donate_argnames=("slots",))
share = jax.jit(slots.share, donate_argnames=("slots",), static_argnames=("layout",))
decode = overlapping_jit(
    of_flat(slots.decode),
    rows=lambda model, slots, *others, **options: slots.state.token,
    static_argnames=("steps", "implementation"),
    donate_argnames=("slots",),
)


def call(
    program: Callable[..., Any], model: Flat, made: slots.Slots | None, *args: Any, **kwargs: Any
) -> tuple[slots.Slots, slots.Drawn]:
    """Runs `read` or `decode`; what was drawn is on its way to the host."""
    made, drawn = program(model, made, *args, **kwargs)
    check_not_traced(drawn, where="Engine")
    drawn = readable(drawn)
    for leaf in (drawn.tokens, drawn.counts, drawn.ended):
        leaf.copy_to_host_async()
    return made, drawn


def compile_all(
    model: Flat,
    made: slots.Slots | None,
    readings: Iterable[slots.Reading],
    halted: Bool[Array, "B"],
    chunks: Iterable[dict[str, Any]],
) -> None:
    """Compiles `read` for each of `readings`, and `decode` with the options of each of `chunks`.

    They are compiled side by side, on as many threads as there are processors. Calls find what was compiled. After a
    failure or a signal, no further one is begun.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        reads = [pool.submit(read.lower(model, made, each).compile) for each in readings]
        steps = [pool.submit(decode.lower(model, made, halted, **each).compile) for each in chunks]
        for compiled in (*reads, *steps):
            compiled.result()
    finally:
        pool.shutdown(cancel_futures=True)
