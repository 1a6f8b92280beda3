"""Options of the verbs that decode."""

from typing import Annotated

import typer

Dense = Annotated[bool, typer.Option("--dense", help="Run dense, even if there are routers.")]
HeadDensity = Annotated[float | None, typer.Option(help="Fraction of heads (groups) to keep.")]
Dtype = Annotated[str | None, typer.Option(help="Dtype of the computation; default: as stored.")]
