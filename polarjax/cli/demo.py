"""`polarjax demo`: runs every step on the small bundled model."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from polarjax.storage.atomic import absolute

MODEL = Path(__file__).parents[1] / "assets" / "opt-6m"


def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("polarjax-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Do a tenth of the work, for a first look.")] = False,
) -> dict[str, Any]:
    """Convert, record, train routers, calibrate, generate and measure; nothing is downloaded."""
    from checkpoints_convert import convert_checkpoint
    from polarjax.demo import DemoOptions, run
    from polarjax.demo.pictures import draw
    from polarjax.demo.report import text

    started = time.perf_counter()
    out = absolute(out)
    convert_checkpoint(MODEL, out / "model", overwrite=True)
    options = (
        DemoOptions(learn=56, measure=4, epochs=1, new_tokens=8, densities=(1.0, 0.75)) if quick else None
    )
    results = run(out / "model", options)
    print(text(results))
    (out / "results.json").write_text(json.dumps(results, indent=1))
    try:
        draw(results, out)
    except ImportError:
        print("\nNo plots, because matplotlib is not installed. Hint: pip install 'polarjax[plot]'")
    print(f"\n{time.perf_counter() - started:.0f} s. Model, results.json and plots are in {out}")
    return results
