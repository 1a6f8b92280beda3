"""Checks before and during tuning: arguments, memory, and numbers that are not finite."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError, SparsityError
from polarjax.memory import device_memory
from polarjax.model.checks import check_windows
from polarjax.numeric import check_type, plain, shown
from polarjax.selection.routers import Routers
from polarjax.sparsity.tune_options import TuneOptions
from polarjax.types import Int32


def check_domains(domains: Any, config: ModelConfig) -> list[Int32[np.ndarray, "n T"]]:
    """The windows of each domain as int32; raises `InputError` unless all are windows of one length."""
    if not isinstance(domains, Sequence) or not domains:
        raise InputError(
            "no text to tune on",
            where="domains",
            got=type(domains).__name__,
            expected="a list of arrays of windows [n T], one for each kind of text",
        )
    checked = [check_windows(windows, config) for windows in domains]
    lengths = sorted({windows.shape[1] for windows in checked})
    if len(lengths) > 1:
        raise InputError(
            "the windows differ in length", where="domains", got=str(lengths), expected="one length"
        )
    return checked


def check_shares(shares: Any, domains: Sequence[Any]) -> tuple[float, ...]:
    """The share of each domain, with a sum of 1; raises `InputError` unless there is a positive number for each."""
    given = [1.0] * len(domains) if shares is None else [plain(each) for each in shares]
    positive = all(type(each) in (int, float) and 0 < each < math.inf for each in given)
    if len(given) != len(domains) or not positive:
        raise InputError(
            "unusable shares of the domains",
            where="shares",
            got=shown(shares),
            expected=f"{len(domains)} positive numbers, one for each domain",
        )
    return tuple(each / sum(given) for each in given)


def check_group_routers(routers: Any, config: ModelConfig) -> Routers:
    """The routers; raises `SparsityError` unless they fit the model."""
    hint = "run polarjax sparsify on the model first"
    check_type(routers, Routers, where="tune", hint=hint, error=SparsityError).check(config)
    return routers


def check_teacher(model: Any, options: TuneOptions) -> None:
    """Raises `SparsityError` if the options ask for something that this model doesn't have."""
    if model.config.num_kv_heads == 1 and options.activation is None:
        raise SparsityError(
            "a model with one group has none to skip",
            where="tune",
            got="1 KV head",
            expected="at least 2",
            hint="tune models with several KV heads",
        )


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled step needs on the device, as the compiler planned them."""
    plan = compiled.memory_analysis()
    parts = {
        "state, teacher and batch": plan.argument_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "results beside the state": plan.output_size_in_bytes - plan.alias_size_in_bytes,
        "program": plan.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def check_memory(needed: dict[str, int]) -> None:
    """Raises `InputError` if a step needs more memory than the device has."""
    memory = device_memory()
    if memory is not None and needed["total"] > memory:
        raise InputError(
            "a step of tuning does not fit the device's memory",
            where="tune",
            got=f"{needed['total'] / 1e9:,.2f} GB",
            expected=f"at most {memory / 1e9:,.2f} GB",
            hint="lower --batch-size and raise --accumulate, train less (--train out), or shorten --window",
        )


def check_finite(parts: dict[str, Any], step: int, saved: str) -> None:
    """Raises `SparsityError` if the loss or a gradient of `step` isn't finite."""
    if not bool(parts["finite"]):
        raise SparsityError(
            "tuning diverged: the loss or a gradient is NaN or infinite",
            where=f"step {step}",
            got=", ".join(f"{name} {float(value):.3g}" for name, value in parts.items() if name != "finite"),
            hint=f"lower --learning-rate{saved}",
        )
