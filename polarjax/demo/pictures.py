"""The demo's two plots; they need matplotlib (`polarjax[plot]`)."""

from pathlib import Path
from typing import Any

from polarjax.evaluation.pictures import LOOKS


def draw(results: dict[str, Any], out: Path) -> list[Path]:
    """Writes `perplexity.png` and `neurons.png` into `out`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = [out / "perplexity.png", out / "neurons.png"]
    for path, fill in zip(paths, (_perplexity, _neurons), strict=True):
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        fill(results, figure, axes)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
    return paths


def _perplexity(results: dict[str, Any], figure: Any, axes: Any) -> None:
    quality = results["quality"]
    densities = [row["density"] for row in quality["rows"]]
    for (name, (color, marker)), line in zip(LOOKS.items(), ("-", "--", "-", ":"), strict=True):
        values = [row[name] for row in quality["rows"]]
        axes.plot(densities, values, line, marker=marker, color=color, label=name)
    rows = quality["important_rows"]
    label = f"router, layer {quality['important_layer']} dense"
    axes.plot(
        [row["density"] for row in rows], [row["router"] for row in rows], "v-.", color="#56B4E9", label=label
    )
    rows = quality["healed"]["rows"]
    label = f"router, layer {quality['important_layer']} dense, healed"
    axes.plot(
        [row["density"] for row in rows], [row["router"] for row in rows], "D-.", color="#E69F00", label=label
    )
    axes.axhline(quality["dense"], color="0.5", linewidth=1, label="dense")
    axes.set(
        yscale="log",
        xlabel="fraction of heads kept in every layer but one (the first unless the legend names another)",
        ylabel="perplexity (log scale)",
        title=f"Which heads are kept matters: {quality['tokens']:,} held-out tokens",
    )
    low, high = axes.get_ylim()
    ticks = [tick for tick in (10, 15, 20, 30, 50, 100, 200, 500, 1000) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(densities, [f"{density:g}" for density in densities])
    axes.invert_xaxis()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _neurons(results: dict[str, Any], figure: Any, axes: Any) -> None:
    plans = results["plans"]
    densities = [plan["density"] for plan in plans]
    image = axes.imshow(list(zip(*densities, strict=True)), vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for row, values in enumerate(zip(*densities, strict=True)):
        for column, value in enumerate(values):
            color = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(plans)), [plan["batch_size"] for plan in plans])
    axes.set(
        xlabel="sequences decoded together",
        ylabel="layer",
        title="Neurons kept: a batch needs the union of what its sequences need",
    )
    figure.colorbar(image, label="fraction of neurons kept")
