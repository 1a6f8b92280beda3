"""Refines group routers and means by distillation: the dense model teaches itself under the routers' own choices."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from polarjax.errors import PolarjaxError, SparsityError
from polarjax.generation.checks import random_key
from polarjax.model.checks import check_model
from polarjax.model.decoder import Decoder
from polarjax.model.spread_checks import check_around
from polarjax.selection.plans import check_density, groups_kept
from polarjax.selection.routers import Routers
from polarjax.sparsity.activations import Activations
from polarjax.sparsity.budgets import measured_budgets
from polarjax.sparsity.checks import check_budgets, check_options, check_routers
from polarjax.sparsity.options import Budgets, RefineOptions
from polarjax.sparsity.tune_options import TuneOptions
from polarjax.sparsity.tuning import TuneReport, tune
from polarjax.types import Array, Key

MEASURED = 8
"""Most validation windows that perplexity is measured on, before and after."""


@jax.transfer_guard("allow")  # it moves windows from the disk by design
def refine(
    model: Decoder,
    routers: Routers,
    activations: Activations,
    key: Key[Array, ""],
    *,
    head_density: float = 0.5,
    dense_layers: tuple[int, ...] = (0,),
    budgets: Budgets = "uniform",
    options: RefineOptions | None = None,
) -> tuple[Routers, TuneReport | None]:
    """Trains group routers and mean outputs further, on the training windows of the activations, as `tune` does.

    Routers that were trained on the dense model have never seen the inputs that skipping groups leads to. Here they
    make the choices, at densities within `options.spread` of `head_density`, and learn the importance of each group
    under them; they and the means learn to minimize KL(dense model ‖ sparse model). The model does not change.

    Args:
      model: the dense model.
      routers: trained for it.
      activations: what `collect` recorded of this model.
      key: random key of what each step draws.
      head_density: fraction of groups that the routers will keep.
      dense_layers: layers whose attention keeps all groups.
      budgets: whether layers keep the groups that they need ("calibrated", measured first) or equally many.
      options: None means the defaults.

    Returns:
      The refined routers, in their dtype, and what was done; None with the given routers if there is nothing to do:
      `options.tokens` is 0, or no group is skipped at this density.

    Raises:
      SparsityError: activations without text or of another model, or training that diverges.
      InputError: a step that does not fit the device's memory.
    """
    check_model(model, where="refine")
    check_around(model)
    options = check_options(options, RefineOptions, "options")
    check_budgets(budgets, "refine")
    check_routers(routers, activations, model.config)
    density = check_density(head_density, where="head density")
    K = model.config.num_kv_heads
    if options.tokens == 0 or groups_kept(density, K) == K:
        return routers, None
    windows = activations.windows_of("train")
    plan = tune_options(options, density, routers, windows.shape)
    held_out = activations.windows_of("validation")[:MEASURED]
    held_out = held_out if len(held_out) else None
    rows = ()
    if budgets == "calibrated":
        rows = measured_budgets(model, routers, activations, dense_layers)
    call = {"options": plan, "held_out": held_out, "dense_layers": dense_layers, "budgets": rows}
    with _own_hints():
        _, refined, report = tune(model, routers, [windows], random_key(key), **call)
    return refined, report


@contextmanager
def _own_hints() -> Iterator[None]:
    """Replaces hints that name options of `tune`."""
    try:
        yield
    except PolarjaxError as error:
        hint = "leave refining out (--refine-tokens 0), or use a device with more memory"
        if isinstance(error, SparsityError):
            hint = "check the model with generate, or leave refining out (--refine-tokens 0)"
        where = f"refine: {error.where}"
        raise type(error)(
            error.what, where=where, got=error.got, expected=error.expected, hint=hint
        ) from error


def tune_options(
    options: RefineOptions, head_density: float, routers: Routers, shape: tuple[int, ...]
) -> TuneOptions:
    """The options of `tune` for training windows of this shape [n T]."""
    count, length = shape
    tokens = options.tokens
    if tokens is None:
        tokens = min(options.most_tokens, options.passes * count * length)
    least = max(head_density - options.spread, 1e-6)
    return TuneOptions(
        tokens=max(tokens, 1),
        batch_size=max(1, options.batch_tokens // length),
        densities=(least, min(head_density + options.spread, 1.0)),
        dense_share=0.0,
        train="routers",
        router_weight=1.0,  # little text: their own loss keeps routers from learning this text alone
        router_width=0,
        router_learning_rate=options.router_rate / routers.layers[0].w_group.shape[0],
        mean_learning_rate=max(options.mean_rate * _size_of_means(routers), 1e-6),
        warmup=options.warmup,
    )


def _size_of_means(routers: Routers) -> float:
    """The root mean square of the mean outputs; 0 without any."""
    means = [layer.mean for layer in routers.layers if layer.mean is not None]
    squares = [jnp.mean(jnp.square(mean.astype(jnp.float32))) for mean in means]
    return float(jax.device_get(jnp.sqrt(sum(squares) / len(squares)))) if squares else 0.0
