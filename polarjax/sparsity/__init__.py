"""Contextual sparsity: recording what a model uses, learning to predict it, deciding how much to keep."""

from typing import TYPE_CHECKING

from polarjax.lazy import lazy_names

if TYPE_CHECKING:
    from polarjax.sparsity.calibration import calibrate
    from polarjax.sparsity.collection import collect
    from polarjax.sparsity.pipeline import sparsify
    from polarjax.sparsity.refinement import refine
    from polarjax.sparsity.training import train_routers
    from polarjax.sparsity.tune_options import TuneOptions
    from polarjax.sparsity.tuning import tune
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "polarjax.sparsity.calibration": "calibrate",
            "polarjax.sparsity.collection": "collect",
            "polarjax.sparsity.pipeline": "sparsify",
            "polarjax.sparsity.refinement": "refine",
            "polarjax.sparsity.training": "train_routers",
            "polarjax.sparsity.tune_options": "TuneOptions",
            "polarjax.sparsity.tuning": "tune",
        },
    )

__all__ = ["TuneOptions", "calibrate", "collect", "refine", "sparsify", "train_routers", "tune"]
