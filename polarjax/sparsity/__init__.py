"""Contextual sparsity: recording what a model uses, learning to predict it, deciding how much to keep."""

from polarjax.sparsity.calibrate import calibrate
from polarjax.sparsity.collect import collect
from polarjax.sparsity.pipeline import sparsify
from polarjax.sparsity.train import train_routers

__all__ = ["calibrate", "collect", "sparsify", "train_routers"]
