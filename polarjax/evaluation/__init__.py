"""What sparsity costs in quality: perplexity, and agreement with the dense model."""

from polarjax.evaluation.greedy_agreement import agreement
from polarjax.evaluation.text_perplexity import perplexity

__all__ = ["agreement", "perplexity"]
