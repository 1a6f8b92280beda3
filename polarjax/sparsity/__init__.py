"""Contextual sparsity: recording what a model uses, learning to predict it, deciding how much to keep."""

from polarjax.sparsity.calibration import calibrate
from polarjax.sparsity.collection import collect
from polarjax.sparsity.pipeline import sparsify
from polarjax.sparsity.training import train_routers

__all__ = ["calibrate", "collect", "sparsify", "train_routers"]
