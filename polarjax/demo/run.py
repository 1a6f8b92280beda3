"""The stages of the demo; each returns its part of `results.json`."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polarjax import costs
from polarjax.checkpoint.bundle import Bundle
from polarjax.checkpoint.learned import write_plans, write_routers
from polarjax.checkpoint.loading import load_with_tokenizer
from polarjax.demo.healed import healed
from polarjax.evaluation import perplexity
from polarjax.generation.generate import Generation, generate
from polarjax.selection.plans import SparsityPlan, dense_plan, uniform_groups
from polarjax.selection.routers import Routers
from polarjax.selection.selectors import Oracle, Random, Selector, Sparsity, Static
from polarjax.sparsity import collect, sparsify
from polarjax.sparsity.activations import Activations, open_activations
from polarjax.sparsity.calibration import measure_recall
from polarjax.sparsity.options import (
    PUBLISHED,
    PUBLISHED_OBJECTIVE,
    CollectOptions,
    RefineOptions,
    TrainOptions,
)
from polarjax.sparsity.training import train_routers
from polarjax.storage.atomic import temporary_folder
from polarjax.text.corpus import Split, standard_library_text
from polarjax.text.token_windows import ScoredWindows, scored_windows
from polarjax.text.tokenizer import Tokenizer

DENSITIES = (1.0, 0.75, 0.625, 0.5, 0.375)
PROMPTS = (
    "def main(",
    "import os\nimport sys\n\n\nclass ",
    "He looked at her and",
    "    def __init__(self, ",
    "It was a dark night, and the wind",
    "for i in range(",
    "The old house stood at the end of the",
    "try:\n    import json\nexcept ImportError:\n",
)


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """How much work the demo does; the defaults take a few minutes on two CPU cores.

    Attributes:
      length: tokens per window.
      learn: windows of text that routers and plans are learned from.
      measure: windows of other text that quality is measured on.
      epochs: passes of router training.
      new_tokens: tokens generated per prompt.
      densities: head densities to measure; the first is 1.
      head_density: head density of the sparse generation.
    """

    length: int = 256
    learn: int = 112
    measure: int = 33
    epochs: int = 4
    new_tokens: int = 32
    densities: tuple[float, ...] = DENSITIES
    head_density: float = 0.75


def run(folder: Path, options: DemoOptions | None = None) -> dict[str, Any]:
    """Runs all stages on a model directory, adds routers and plans to it, and returns the measurements.

    Args:
      folder: the model directory of a ReLU model with a tokenizer.
      options: how much work to do; None means the defaults.
    """
    options = options or DemoOptions()
    bundle, tokenizer = load_with_tokenizer(folder, "float32")
    learn = _windows("calibration", tokenizer, options.length, options.learn)
    held_out = _windows("evaluation", tokenizer, options.length, options.measure)
    started = time.perf_counter()
    bundle, selectors, learned = _learn(bundle, folder, learn.tokens, options)
    return {
        "settings": dataclasses.asdict(options)
        | {"device": jax.devices()[0].device_kind, "jax": jax.__version__},
        "learning": learned | {"seconds": time.perf_counter() - started},
        "plans": _plans(bundle, held_out.tokens),
        "generation": _generation(bundle, options),
        "quality": _quality(bundle, selectors, held_out, options)
        | {"healed": _healed(bundle, selectors.important, held_out, options)},
        "costs": _costs(bundle, options),
    }


def _windows(split: Split, tokenizer: Tokenizer, length: int, most: int) -> ScoredWindows:
    text = standard_library_text(split)
    return scored_windows([text], tokenizer, length, most=most, source="the standard library")


def _learn(
    bundle: Bundle, folder: Path, windows: np.ndarray, options: DemoOptions
) -> tuple[Bundle, "Selectors", dict[str, Any]]:
    training = TrainOptions(
        learning_rate=1e-3,
        neuron_batch=256,
        group_batch=256,
        max_epochs=options.epochs,
        group_objective=PUBLISHED_OBJECTIVE,
    )
    with temporary_folder("polarjax-demo") as temporary:
        keep = temporary / "activations"
        routers, plans, report = sparsify(
            bundle.model,
            windows,
            jax.random.key(0),
            head_density=options.head_density,
            collecting=CollectOptions(folder=keep, **PUBLISHED),
            training=training,
            refinement=RefineOptions(tokens=0),
            budgets="uniform",
        )
        selectors = _selectors(open_activations(keep), routers, training, options)
    write_routers(folder, routers)
    write_plans(folder, plans)
    learned = {
        "tokens": report.tokens,
        "stages": report.seconds,
        "training": dataclasses.asdict(report.training),
    }
    return dataclasses.replace(bundle, routers=routers, plans=plans), selectors, learned


@dataclasses.dataclass(frozen=True)
class Selectors:
    """Everything learned for selecting groups.

    Attributes:
      routers: for each head density, routers trained to find that many groups.
      static: mean norm of each group over the training tokens.
      regressors: routers that predict norms, used at every density.
      important: the layer whose attention turns the residual stream the most.
    """

    routers: dict[float, Routers]
    static: Static
    regressors: Routers
    important: int


def _selectors(
    activations: Activations, routers: Routers, training: TrainOptions, options: DemoOptions
) -> Selectors:
    def groups_alone(density: float, options: TrainOptions) -> Routers:
        call: dict[str, Any] = {"head_density": density, "neurons": False, "options": options}
        return train_routers(activations, activations.config, jax.random.key(0), **call)[0]

    found = dict.fromkeys((1.0, options.head_density), routers)
    for density in sorted(set(options.densities) - set(found)):
        found[density] = groups_alone(density, training)
    of_norms = dataclasses.replace(training, group_objective="importance", max_epochs=3 * options.epochs)
    norms = activations.records("norms", activations.rows("train"))
    return Selectors(
        routers=found,
        static=Static(jnp.asarray(np.asarray(norms, np.float32).mean(1))),
        regressors=groups_alone(options.head_density, of_norms),
        important=int(np.argmax(activations.attention_importance())),
    )


def _plans(bundle: Bundle, windows: np.ndarray) -> list[dict[str, Any]]:
    """Neuron density of each batch size's plan, and its recall on text that nothing was learned from."""
    plans, routers, config = bundle.plans, bundle.routers, bundle.model.config
    if plans is None or routers is None:
        return []
    with temporary_folder("polarjax-demo") as temporary:
        other = collect(bundle.model, windows, temporary / "activations", held_out=(0.0, 0.0), **PUBLISHED)
        recall = measure_recall(other, routers, plans, key=jax.random.key(1), part=None)
    return [
        {
            "batch_size": size,
            "density": [(k or config.d_ff) / config.d_ff for k in counts],
            "recall": list(found),
        }
        for size, counts, found in zip(plans.batch_sizes, plans.neurons, recall, strict=True)
    ]


def _generation(bundle: Bundle, options: DemoOptions) -> dict[str, Any]:
    """Continues the prompts dense and sparse, times both on a second run, and compares dense with density 1."""
    tokenizer, config = bundle.tokenizer, bundle.model.config
    if tokenizer is None:
        return {}
    tokens, lengths = map(jnp.asarray, tokenizer.encode(PROMPTS))

    def continued(sparsity: Sparsity | None) -> tuple[Generation, float]:
        call = lambda: jax.block_until_ready(
            generate(bundle.model, tokens, lengths, max_new_tokens=options.new_tokens, sparsity=sparsity)
        )
        call()
        started = time.perf_counter()
        made = call()
        return made, int(made.lengths.sum()) / (time.perf_counter() - started)

    sparse = bundle.sparsity(len(PROMPTS), options.head_density)
    everything = SparsityPlan((config.d_ff,) * config.num_layers, (config.num_kv_heads,) * config.num_layers)
    dense_made, dense_pace = continued(None)
    sparse_made, sparse_pace = continued(sparse)
    full_made, _ = continued(Sparsity(sparse.routers, everything))
    texts = lambda made: tokenizer.decode(np.asarray(made.tokens), np.asarray(made.lengths))
    return {
        "prompts": list(PROMPTS),
        "prompt_tokens": lengths.tolist(),
        "dense": texts(dense_made),
        "sparse": texts(sparse_made),
        "tokens_per_second": {"dense": dense_pace, "sparse": sparse_pace},
        "density_1_equals_dense": bool(np.array_equal(full_made.tokens, dense_made.tokens)),
    }


def _quality(
    bundle: Bundle, learned: Selectors, windows: ScoredWindows, options: DemoOptions
) -> dict[str, Any]:
    """Measures the perplexity of each selector at each head density, masked at every position, neurons dense.

    It does so twice: as published, with the first layer dense and routers trained for each density; and with the
    important layer dense, the same number of groups kept, and one router that predicts norms.
    """
    random, static = Random(jax.random.key(2)), learned.static
    measure = functools.partial(
        perplexity, bundle.model, windows.tokens, scored=windows.scored, batch_size=11
    )
    dense = measure(description="perplexity, dense")

    def masked(name: str, selector: Selector, density: float, layer: int) -> float:
        groups = uniform_groups(bundle.model.config, density, dense_layers=(layer,))
        sparsity = Sparsity(selector, SparsityPlan(dense_plan(bundle.model.config).neurons, groups))
        label = f"perplexity, {name} at {density:g}, layer {layer} dense"
        return measure(sparsity=sparsity, description=label).perplexity

    def rows(selectors: Callable[[float], Mapping[str, Selector]], densities: tuple[float, ...], layer: int):
        return [
            {"density": density}
            | {name: masked(name, selector, density, layer) for name, selector in selectors(density).items()}
            for density in densities
        ]

    published = lambda density: {
        "router": learned.routers[density],
        "oracle": Oracle(),
        "random": random,
        "static": static,
    }
    important = lambda density: {"router": learned.regressors, "oracle": Oracle(), "static": static}
    return {
        "dense": dense.perplexity,
        "tokens": dense.tokens,
        "rows": rows(published, options.densities, 0),
        "important_layer": learned.important,
        "important_rows": rows(important, options.densities[1:], learned.important),
    }


def _healed(bundle: Bundle, layer: int, windows: ScoredWindows, options: DemoOptions) -> dict[str, Any]:
    """The perplexity of the healed model, dense and with its own routers; `layer` is dense."""
    model, routers = healed(bundle.model)
    measure = functools.partial(perplexity, model, windows.tokens, scored=windows.scored, batch_size=11)
    neurons = dense_plan(model.config).neurons
    rows = []
    for density in options.densities[1:]:
        groups = uniform_groups(model.config, density, dense_layers=(layer,))
        sparsity = Sparsity(routers, SparsityPlan(neurons, groups))
        found = measure(sparsity=sparsity, description=f"perplexity, healed, router at {density:g}")
        rows.append({"density": density, "router": found.perplexity})
    return {"dense": measure(description="perplexity, healed, dense").perplexity, "rows": rows}


def _costs(bundle: Bundle, options: DemoOptions) -> list[dict[str, Any]]:
    """Bytes that a decoding step must read or write per token, dense and with the plan, in bfloat16."""
    config, plans = bundle.model.config, bundle.plans
    if plans is None:
        return []
    rows = []
    for size in plans.batch_sizes:
        call: dict[str, Any] = {"batch_size": size, "cache_length": config.max_positions}
        plan = plans.for_batch(size, config, options.head_density)
        dense, sparse = (costs.decode_bytes(config, plan=each, **call) for each in (None, plan))
        rows.append({"batch_size": size, "dense": dense.per_token, "sparse": sparse.per_token})
    return rows
