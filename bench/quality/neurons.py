"""Which neurons of a model's MLPs a batch could skip, what that costs in perplexity, and whether the kernel gains.

    python -m bench.quality.neurons MODEL_DIRECTORY --text TEXT [--out neurons.jsonl]

Prints, and with --out appends as JSON lines:

- `neurons`, one row a batch size, a value a layer: for ReLU models the natural density (active neurons of a token) and
  that of the union over the batch; for others the density at which the batch's best neurons keep a --share of the
  output's norm (`polarjax.sparsity.kept_share`), and the union of the tokens' own best neurons at that share. Batches
  are random tokens of the text.
- `perplexity`, one row a selector, batch size and density: neurons chosen at each position for B windows, as decoding B
  sequences does, by their true importance ("oracle": the best that a router could do), or by the model's routers, if
  it has neuron routers, at fixed densities and as its plans say.
- `verdict`, one row a batch size: the lowest measured density within --tolerance of the dense perplexity, and the sparse
  MLP's speed there and its break-even density in `bench/results/sparse_mlp.jsonl`, without the time of a router.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report
from bench.quality.break_even import Kernel, kernels, nearest_batch
from bench.quality.neuron_passes import Text, mean_share, own_top, union
from polarjax.checkpoint.bundle import Bundle
from polarjax.checkpoint.loading import load_with_tokenizer
from polarjax.errors import InputError, PolarjaxError
from polarjax.model.parameters import fingerprint
from polarjax.progress import show_lines, task
from polarjax.sparsity.calibration import random_batches
from polarjax.storage.fingerprint import short
from polarjax.text.corpus import read_text
from polarjax.text.token_windows import scored_windows

GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = 512  # of random batches at each batch size


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; 0 unless the arguments can't be used."""
    asked = _options(arguments)
    try:
        with show_lines():
            rows, head = measure(asked)
    except PolarjaxError as error:
        print(error, file=sys.stderr)
        return 1
    for kind, columns in COLUMNS.items():
        print(f"\n{kind}\n{report.table([_short(row) for row in rows if row['kind'] == kind], columns)}")
    print("\n" + "\n".join(row["says"] for row in rows if row["kind"] == "verdict"))
    if asked.out is not None:
        report.append_jsonl(asked.out, rows, head)
    return 0


COLUMNS = {
    "neurons": ("batch", "natural", "union", "density_at_share", "share_at_half"),
    "perplexity": ("selector", "batch", "density", "perplexity", "increase", "standard_error"),
    "verdict": ("batch", "density", "increase", "break_even", "speedup", "kernel_batch"),
}


def measure(asked: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows, and what they have in common."""
    bundle, tokenizer = load_with_tokenizer(asked.model, asked.dtype)
    config, table = bundle.model.config, kernels(gated=bundle.model.config.gated_mlp)
    texts = [read_text(path) for path in asked.text]
    source = ", ".join(map(str, asked.text))
    windows = scored_windows(texts, tokenizer, asked.window, most=asked.windows, source=source).tokens
    batches = [size for size in asked.batches if size <= windows.size]
    together = [size for size in asked.perplexity_batches if size <= len(windows)]
    if not batches or not together or any(len(windows) % size for size in together):
        raise InputError(
            "the windows don't fill the batches",
            where=source,
            got=f"{len(windows)} windows",
            expected=f"a multiple of {', '.join(map(str, asked.perplexity_batches))}",
            hint="use a longer text, or choose --windows and --perplexity-batches",
        )
    text = Text(bundle.model, jnp.asarray(windows))
    head = report.provenance(
        model=asked.name or asked.model.name,
        weights=short(fingerprint(bundle.model)),
        activation=config.activation,
        gated=config.gated_mlp,
        dtype=bundle.model.dtype.name,
        text=[path.name for path in asked.text],
        text_sha256=[hashlib.sha256(each.encode()).hexdigest()[:16] for each in texts],
        windows=list(windows.shape),
        seed=asked.seed,
        polarjax=version("polarjax"),
    )
    rows, dense = _densities(text, batches, asked)
    rows += _perplexities(bundle, text, dense, together, asked.densities)
    return rows + _verdicts(rows, table, asked.tolerance), head


def _densities(
    text: Text, batches: Sequence[int], asked: argparse.Namespace
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The rows `neurons`, and the windows' dense losses."""
    config, count = text.model.config, text.tokens.size
    drawn = np.random.default_rng(asked.seed)
    number = lambda size: max(2, min(count // size, TOKENS // size)) if size < count else 1
    index = {size: jnp.asarray(random_batches(drawn, count, size, number(size))) for size in batches}
    measured = _natural if config.neuron_sparsity else _by_share(asked.share)
    found: dict[int, list[dict[str, Any]]] = {size: [] for size in batches}
    losses = np.zeros(len(text.tokens))
    with task("measure neurons", config.num_layers, "layers") as advance:
        for layer, hidden, active in text.dense(losses):
            for size, row in measured(layer, hidden, active, index).items():
                found[size].append(row)
            advance()
    rows = [{"kind": "neurons", "batch": size, **_by_name(layers)} for size, layers in found.items()]
    return rows, losses


def _by_name(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists over layers in place of a dictionary for each layer."""
    return {name: [round(float(layer[name]), 4) for layer in layers] for name in layers[0]}


def _natural(layer: Any, hidden: Any, active: Any, index: dict[int, Any]) -> dict[int, dict[str, Any]]:
    natural = jnp.mean(active, dtype=jnp.float32)
    return {size: {"natural": natural, "union": union(active, rows)} for size, rows in index.items()}


def _by_share(share: float) -> Callable[..., dict[int, dict[str, Any]]]:
    """Measures the density at which a share of the output is kept, in one layer at each batch size."""

    def measured(layer: Any, hidden: Any, active: Any, index: dict[int, Any]) -> dict[int, dict[str, Any]]:
        width = hidden.shape[-1]
        counts = np.maximum(1, np.round(np.asarray(GRID) * width)).astype(np.int32)
        grid, found, own = np.asarray([0.0, *(counts / width), 1.0]), {}, None
        for size, rows in sorted(index.items()):
            curve = [0.0, *np.asarray(mean_share(layer, hidden, rows, jnp.asarray(counts))), 1.0]
            density = float(np.interp(share, curve, grid))
            if own is None:
                own = own_top(layer, hidden, jnp.asarray(max(1, round(density * width)), jnp.int32))
            found[size] = {
                "density_at_share": density,
                "share_at_half": np.interp(0.5, grid, curve),
                "union": union(own, rows),
            }
        return found

    return measured


def _perplexities(
    bundle: Bundle, text: Text, dense: np.ndarray, batches: Sequence[int], densities: Sequence[float]
) -> list[dict[str, Any]]:
    """The rows `perplexity`."""
    rows, cases = [], list(_cases(bundle, batches, densities))
    with task("measure perplexity", len(cases), "cases") as advance:
        for name, batch, kept, routers in cases:
            change = text.sparse(kept, batch, routers) - dense
            full = text.model.config.d_ff
            rows.append(
                {
                    "kind": "perplexity",
                    "selector": name,
                    "batch": batch,
                    "density": float(np.mean([(count or full) / full for count in kept])),
                    "perplexity": float(np.exp(np.mean(dense + change))),
                    "dense": float(np.exp(np.mean(dense))),
                    "increase": float(np.expm1(np.mean(change))),
                    "standard_error": float(np.std(change, ddof=1) / len(change) ** 0.5)
                    if len(change) > 1
                    else None,
                }
            )
            advance()
    return rows


def _cases(bundle: Bundle, batches: Sequence[int], densities: Sequence[float]) -> Iterator[tuple[Any, ...]]:
    """Selector, batch size, neurons kept in each layer, and the routers, None for the oracle."""
    config, routers = bundle.model.config, bundle.routers
    routed = routers is not None and all(router.w_in is not None for router in routers.layers)
    for batch in batches:
        for density in densities:
            kept = (max(1, round(density * config.d_ff)),) * config.num_layers
            yield "oracle", batch, kept, None
            if routed:
                yield "router", batch, kept, routers
        if routed and bundle.plans is not None:
            planned = bundle.plans.for_batch(batch, config).neurons
            yield "router, plan", batch, planned, routers


def _verdicts(rows: list[dict[str, Any]], measured: list[Kernel], tolerance: float) -> list[dict[str, Any]]:
    """The rows `verdict`: by the oracle, so a real router does worse."""
    made = []
    oracle = [row for row in rows if row.get("selector") == "oracle"]
    for batch in sorted({row["batch"] for row in oracle}):
        within = [row for row in oracle if row["batch"] == batch and row["increase"] <= tolerance]
        best = min(within, key=lambda row: row["density"], default=None)
        near = nearest_batch(batch, measured)
        shapes = [kernel for kernel in measured if kernel.batch == near]
        even = [round(kernel.break_even, 2) for kernel in shapes]
        row = {"kind": "verdict", "batch": batch, "kernel_batch": near, "break_even": [min(even), max(even)]}
        cost = f"batch {batch}: even the oracle costs more than {tolerance:.0%} at every density measured"
        if best is not None:
            speed = [kernel.speedup(best["density"]) for kernel in shapes]
            gains = [round(each, 2) for each in speed if each is not None]
            row |= {"density": best["density"], "increase": best["increase"]}
            row |= {"speedup": [min(gains), max(gains)] if gains else None}
            times = (
                f"{min(gains)} to {max(gains)} times as fast as the dense one" if gains else "not measured"
            )
            cost = (
                f"batch {batch}: the oracle keeps {best['density']:.0%} of the neurons for "
                f"{best['increase']:+.1%} perplexity; there the sparse MLP is {times} (kernel table, batch {near})"
            )
            same = ("router", batch, best["density"])
            for other in rows:
                if (other.get("selector"), other["batch"], other.get("density")) == same:
                    row |= {"router_increase": other["increase"]}
                    cost += f"; the router's choice costs {other['increase']:+.1%}"
        made.append(row | {"says": cost})
    return made


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Lists over layers as their mean and range, for the table."""
    show = lambda found: (
        f"{found[0]:.2f}-{found[-1]:.2f}"
        if len(found) == 2
        else f"{np.mean(found):.3f} ({min(found):.2f}-{max(found):.2f})"
    )
    return {name: show(value) if isinstance(value, list) else value for name, value in row.items()}


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(sorted({kind(each) for each in text.split(",")}))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", help="what the rows call the model; default: the directory's name")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=256, help="tokens a window")
    parser.add_argument("--batches", type=_numbers(int), default=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
    parser.add_argument("--perplexity-batches", type=_numbers(int), default=(1, 4, 16, 64))
    parser.add_argument("--densities", type=_numbers(float), default=(0.1, 0.25, 0.5, 0.75))
    parser.add_argument(
        "--share", type=float, default=0.9, help="of the output's norm, for models without ReLU"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="increase of perplexity that is tolerable"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else None)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
