"""What sparsity costs in quality: perplexity, and agreement with the dense model."""

from polarjax.evaluation.agreement import agreement
from polarjax.evaluation.perplexity import perplexity

__all__ = ["agreement", "perplexity"]
