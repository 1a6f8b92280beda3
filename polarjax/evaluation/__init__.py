"""What sparsity costs in quality: perplexity, and agreement with the dense model."""

from typing import TYPE_CHECKING

from polarjax.lazy import lazy_names

if TYPE_CHECKING:
    from polarjax.evaluation.greedy_agreement import agreement
    from polarjax.evaluation.text_perplexity import perplexity
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "polarjax.evaluation.greedy_agreement": "agreement",
            "polarjax.evaluation.text_perplexity": "perplexity",
        },
    )

__all__ = ["agreement", "perplexity"]
