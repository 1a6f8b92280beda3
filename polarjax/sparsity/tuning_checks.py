"""Checks before and during tuning: arguments, memory, and numbers that are not finite."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from polarjax.configs import ModelConfig
from polarjax.errors import InputError, SparsityError
from polarjax.memory import fraction_hint, memory_limit
from polarjax.model.checks import check_windows
from polarjax.model.spread_checks import check_around
from polarjax.numeric import check_type, plain, shown, whole_number
from polarjax.selection.routers import Routers
from polarjax.selection.table_checks import as_layers, check_budget_rows
from polarjax.sparsity.tune_options import TuneOptions
from polarjax.sparsity.tuning_setup import Setup
from polarjax.types import Int32


def check_domains(domains: Any, config: ModelConfig) -> list[Int32[np.ndarray, "n T"]]:
    """The windows of each domain as int32; raises `InputError` unless all are windows of one length, at least 2."""
    if not isinstance(domains, Sequence) or not domains:
        raise InputError(
            "no text to tune on",
            where="domains",
            got=type(domains).__name__,
            expected="a list of arrays of windows [n T], one for each kind of text",
            hint="pass [windows]",
        )
    checked = [check_windows(windows, config) for windows in domains]
    lengths = sorted({windows.shape[1] for windows in checked})
    if len(lengths) > 1:
        hint = "cut all texts into windows of one length"
        raise InputError(
            "the windows differ in length",
            where="domains",
            got=str(lengths),
            expected="one length",
            hint=hint,
        )
    if lengths[0] < 2:
        hint = "cut longer windows (--window)"
        raise InputError("windows without a next token", where="domains", got="windows of 1 token", hint=hint)
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
            hint="leave them out to mix the domains equally",
        )
    return tuple(each / sum(given) for each in given)


def check_layers(dense_layers: Any, budgets: Any, config: ModelConfig) -> tuple[int, ...]:
    """The numbers of the dense layers; raises `SparsityError` unless these and the budgets fit the model."""
    L, K = config.num_layers, config.num_kv_heads
    check_budget_rows(budgets, L, K, where="tune: budgets")
    return as_layers(dense_layers, L, where="tune", hint="pass for example (0,)")


def check_group_routers(routers: Any, config: ModelConfig) -> Routers:
    """The routers; raises `SparsityError` unless they fit the model."""
    hint = "run polarjax sparsify on the model first"
    check_type(routers, Routers, where="tune", hint=hint, error=SparsityError).check(config)
    return routers


def check_teacher(model: Any, options: TuneOptions) -> None:
    """Raises `SparsityError` if the options ask for something that this model doesn't have, `InputError` if it would run
    on a mesh that it doesn't lie on."""
    check_around(model)
    if model.config.num_kv_heads == 1 and options.activation is None:
        raise SparsityError(
            "a model with one group has none to skip",
            where="tune",
            got="1 KV head",
            expected="at least 2",
            hint="tune models with several KV heads",
        )
    activation = options.activation or model.config.activation
    if options.l1 and activation != "relu":
        raise SparsityError(
            "a penalty on active neurons needs a ReLU, without which no neuron is ever inactive",
            where="tune",
            got=f"l1 {options.l1:g} with {activation}",
            hint="add activation='relu' (--activation relu), or drop l1",
        )


def check_devices(devices: Any, options: TuneOptions) -> int:
    """How many local devices a batch is divided over; raises `InputError` if it can't be so many.

    None takes the most that divide the batch evenly.
    """
    here, rows = jax.local_device_count(), options.batch_size
    if devices is None:
        return max(count for count in range(1, here + 1) if rows % count == 0)
    count = whole_number(devices, "devices", where="tune")
    if count > here:
        hint = "leave the number out to use as many as divide a batch"
        raise InputError(
            "there are fewer devices", where="tune", got=count, expected=f"at most {here}", hint=hint
        )
    if rows % count:
        raise InputError(
            "a batch can't be divided evenly over the devices",
            where="tune",
            got=f"{rows} windows, {count} devices",
            hint=f"make the batch size (--batch) a multiple of {count}, or use fewer devices",
        )
    return count


def check_memory(plan: Setup) -> None:
    """Raises `InputError` if a step needs more memory than the device has; names one that fits, if any does."""
    memory = memory_limit()
    if memory is None or plan.fits():
        return
    over = plan.least > memory  # such a step may be too large to compile
    needed = plan.least if over else plan.memory["total"]
    raise InputError(
        "a step of tuning does not fit the device's memory",
        where="tune",
        got=f"{'at least ' if over else ''}{needed / 1e9:,.2f} GB",
        expected=f"at most {memory / 1e9:,.2f} GB",
        hint=fraction_hint(needed) or _fitting(plan),
    )


def _fitting(plan: Setup) -> str:
    found = next((each for each in plan.smaller() if each.fits()), None)
    if found is None:
        return (
            "lower the batch size (--batch), shorten the windows (--window), or use a device with more memory"
        )
    options, size = found.options, f"{found.memory['total'] / 1e9:,.2f} GB"
    if options.train != plan.options.train:
        return f"train less: {options.train} (--train {options.train}) needs {size}"
    batch, accumulate = options.batch_size, options.accumulate
    return f"make batches of {batch} and accumulate {accumulate} (--batch {batch} --accumulate {accumulate}): {size}"


def check_finite(parts: dict[str, Any], step: int, saved: str) -> None:
    """Raises `SparsityError` if the loss or a gradient of `step` isn't finite."""
    if not bool(parts["finite"]):
        raise SparsityError(
            "tuning diverged: the loss or a gradient is NaN or infinite",
            where=f"step {step}",
            got=", ".join(
                f"{name} {float(value):.3g}"
                for name, value in parts.items()
                if value.ndim == 0 and name != "finite"
            ),
            hint=f"lower --learning-rate and start over{saved}",
        )
