"""Race detection of Pallas's GPU interpreter, whichever way the installed JAX tells of a race."""

from collections.abc import Callable
from typing import Any

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter


def race_found(run: Callable[[], Any]) -> bool:
    """Whether two accesses of what `run` computes were unordered; JAX 0.12 raises where the second one happens."""
    interpreter.reset_gpu_interpret_mode_state()
    try:
        run()
    except RuntimeError as error:
        if "RACE DETECTED" not in str(error):
            raise
        return True
    else:
        return interpreter.get_races().races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()
