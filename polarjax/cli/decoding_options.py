"""Options of the verbs that decode."""

from typing import Annotated

import typer

Dense = Annotated[bool, typer.Option("--dense", help="Run dense, even if there are routers.")]
HeadDensity = Annotated[float | None, typer.Option(help="Fraction of heads (groups) to keep.")]
Dtype = Annotated[str | None, typer.Option(help="Dtype of the computation; default: as stored.")]
Mesh = Annotated[
    str | None,
    typer.Option(
        help="Devices to share the model: data=2,model=4 divides sequences over 2 and each layer over 4. With "
        "vocab=whole, every device has the whole vocabulary."
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="With --mesh: what devices of the model axis divide in attention, groups or sequences; default: what the "
        "plans were made for, or groups."
    ),
]
